// The scans as an extension of OpenVINO: Core.add_extension loads this library, for models in ONNX and in OpenVINO's
// IR.
#include <oneapi/tbb/blocked_range.h>
#include <oneapi/tbb/parallel_for.h>

#include <openvino/core/extension.hpp>
#include <openvino/core/op_extension.hpp>
#include <openvino/frontend/onnx/extension/op.hpp>
#include <openvino/op/op.hpp>

#include "scans.h"

namespace ssm_runtimes {

// On the threads that OpenVINO runs a model with: it is TBB that it uses.
void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, const void*), const void* context) {
  using Range = oneapi::tbb::blocked_range<int64_t>;
  oneapi::tbb::parallel_for(Range(0, count, std::max<int64_t>(grain, 1)),
                            [&](const Range& range) { body(range.begin(), range.end(), context); });
}

template <class Scan>
class Operator : public ov::op::Op {
 public:
  Operator() = default;
  explicit Operator(const ov::OutputVector& inputs, Scan scan = {}) : Op(inputs), scan_(std::move(scan)) {
    constructor_validate_and_infer_types();
  }

  static const ov::DiscreteTypeInfo& get_type_info_static() {
    static const ov::DiscreteTypeInfo info{Scan::kName, kDomain};
    return info;
  }
  const ov::DiscreteTypeInfo& get_type_info() const override { return get_type_info_static(); }

  void validate_and_infer_types() override {
    OPENVINO_ASSERT(get_input_size() == Scan::kInputs, Scan::kName, " has ", int(Scan::kInputs), " inputs, got ",
                    get_input_size());
    set_output_type(0, get_input_element_type(Scan::kX), get_input_partial_shape(Scan::kX));
  }

  std::shared_ptr<ov::Node> clone_with_new_inputs(const ov::OutputVector& inputs) const override {
    return std::make_shared<Operator>(inputs, scan_);
  }

  bool visit_attributes(ov::AttributeVisitor& visitor) override {
    if constexpr (std::is_same_v<Scan, RouteScan>) {
      visitor.on_attribute("routes", scan_.routes);
      visitor.on_attribute("per_line", scan_.per_line);
      visitor.on_attribute("delta_softplus", scan_.delta_softplus);
    } else {
      visitor.on_attribute("reverse", scan_.reverse);
    }
    return true;
  }

  bool has_evaluate() const override { return true; }

  bool evaluate(ov::TensorVector& outputs, const ov::TensorVector& tensors) const override {
    std::vector<Array> inputs;
    for (const ov::Tensor& tensor : tensors) {
      OPENVINO_ASSERT(tensor.get_element_type() == ov::element::f32, Scan::kName, " takes float32, got ",
                      tensor.get_element_type());
      const ov::Shape& shape = tensor.get_shape();
      inputs.push_back({static_cast<const float*>(tensor.data()), Shape(shape.begin(), shape.end())});
    }
    outputs[0].set_shape(tensors[Scan::kX].get_shape());
    scan_.run(inputs, static_cast<float*>(outputs[0].data()), parallel_for);
    return true;
  }

 private:
  Scan scan_;
};

template <class Scan>
ov::Extension::Ptr from_onnx() {
  return std::make_shared<ov::frontend::onnx::OpExtension<Operator<Scan>>>(Scan::kName, kDomain);
}

}  // namespace ssm_runtimes

OPENVINO_CREATE_EXTENSIONS(std::vector<ov::Extension::Ptr>({
    std::make_shared<ov::OpExtension<ssm_runtimes::Operator<ssm_runtimes::RouteScan>>>(),
    std::make_shared<ov::OpExtension<ssm_runtimes::Operator<ssm_runtimes::WavefrontScan>>>(),
    ssm_runtimes::from_onnx<ssm_runtimes::RouteScan>(),
    ssm_runtimes::from_onnx<ssm_runtimes::WavefrontScan>(),
}));
