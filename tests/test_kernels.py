"""The GPU kernel, run by Triton's interpreter on the CPU where Triton is installed (``pip install triton``)."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from dqar import stats

SCRIPT = """
import itertools, torch
from dqar import kernels

def truth(q, k, scale):
    p = (q.double() @ k.double().transpose(-1, -2) * scale).softmax(-1)
    return -torch.special.xlogy(p, p).sum(-1)

torch.manual_seed(0)
worst = {}
def check(name, q, k, scale=None):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    error = (kernels.query_entropy(q, k, scale).double() - truth(q, k, scale)).abs().max().item()
    worst[name] = max(worst.get(name, 0), error)

for (nq, nk), d in itertools.product([(1, 1), (7, 7), (64, 64), (200, 256), (65, 130)], [16, 24, 72]):
    check("shapes", torch.randn(2, 3, nq, d), torch.randn(2, 3, nk, d))
q, k = torch.randn(2, 2, 70, 24), torch.randn(2, 2, 130, 24)
check("custom scale", q, k, 0.7)
check("one key wins", 100 * q, 100 * k)
check("uniform", 0 * q, k)
check("offset", torch.cat([q, torch.full((2, 2, 70, 1), 1e3)], -1), torch.cat([k, torch.ones(2, 2, 130, 1)], -1), 1.0)
rising = torch.linspace(-9, 9, 300).view(1, 1, 300, 1).expand(1, 1, 300, 16)
check("rising scores", torch.ones(1, 1, 3, 16), rising, 1.0)
check("falling scores", torch.ones(1, 1, 3, 16), -rising, 1.0)
strided = torch.randn(2, 130, 2, 24).transpose(1, 2)
check("strided", strided[:, :, ::2], strided.flip(2))
check("half", q.half(), k.half())  # the interpreter has no bfloat16 products
print(worst)
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_kernel_gives_the_entropy_of_the_softmax():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported, hence the process
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    worst = eval(done.stdout.strip().splitlines()[-1])
    offset = worst.pop("offset")  # scores near 1000: float32 itself is 6e-5 there
    assert len(worst) == 8 and max(worst.values()) < 2e-5 and offset < 1e-3, (worst, offset)


def test_the_kernel_serves_gpus_only(monkeypatch):
    monkeypatch.setitem(sys.modules, "dqar.kernels", None)  # an import of it fails
    query = torch.randn(1, 2, 9, 8)
    assert stats.query_entropy(query, query).shape == (1, 2, 9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_entropy_is_the_cpus():
    query, key = torch.randn(2, 1, 2, 300, 8)
    expected = stats.query_entropy(query, key, 0.5)
    torch.testing.assert_close(stats.query_entropy(query.cuda(), key.cuda(), 0.5).cpu(), expected, atol=1e-4, rtol=0)
