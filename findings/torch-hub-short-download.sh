#!/bin/sh
# torch 2.13.0 (CPU), numpy 2.4.6, Python 3.11, x86-64
#
# torch.hub takes a connection that breaks off for the end of the file: download_url_to_file does not compare what it got
# with the Content-Length that it knows for its progress bar. load_state_dict_from_url then keeps the half file in its
# cache under the final name and fails on it in every later run, too, without asking the server again, until somebody
# deletes it; its comments say that a broken download leaves nothing. Only names that carry a hash, with check_hash=True,
# are checked.
#
# Seen:
#   download of 5000 of 10000 bytes: no error, 5000 bytes kept
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
trap 'exit 130' INT TERM
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install --quiet --no-compile numpy==2.4.6 torch==2.13.0
no_proxy='*' "$dir/venv/bin/python" - "$dir" <<'EOT'
import http.server
import os
import sys
import threading

import torch


class Breaking(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header('Content-Length', '10000')
        self.end_headers()
        self.wfile.write(bytes(5000))

    def log_message(self, *args):
        pass


server = http.server.HTTPServer(('127.0.0.1', 0), Breaking)
threading.Thread(target=server.serve_forever, daemon=True).start()
path = os.path.join(sys.argv[1], 'model.pth')
error = 'no error'
try:
    torch.hub.download_url_to_file(f'http://127.0.0.1:{server.server_port}/model.pth', path, progress=False)
except Exception as raised:
    error = repr(raised)
kept = os.path.getsize(path) if os.path.exists(path) else 0
print(f'download of 5000 of 10000 bytes: {error}, {kept} bytes kept')
sys.exit((error, kept) != ('no error', 5000))
EOT
