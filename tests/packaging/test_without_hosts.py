"""Where no host library is installed."""

import subprocess
import sys


def test_a_missing_mmengine_is_named_with_the_remedy(root):
    script = 'import sys; sys.modules["mmengine"] = None; import ssm_backbones'
    result = subprocess.run([sys.executable, '-c', script], cwd=root, capture_output=True, text=True)
    last = result.stderr.strip().splitlines()[-1]
    assert result.returncode and last.startswith('ImportError: ssm_backbones needs mmengine'), result.stderr
    assert 'ssm-backbones[openmmlab]' in last and '`import cuda_ops`, need torch alone' in last
