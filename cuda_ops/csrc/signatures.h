// The types of the operators' arguments as the bindings were compiled with, by operator. The stable ABI does not
// compare them with the schema; the Python side does.
#pragma once

#include <map>
#include <string>

namespace cuda_ops {

inline std::map<std::string, std::string>& signatures() {
  static std::map<std::string, std::string> by_operator;
  return by_operator;
}

}  // namespace cuda_ops
