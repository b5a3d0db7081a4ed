"""What is read of the processor."""

import pytest

from ssm_backbones.utils import processor


@pytest.mark.parametrize(('vendor', 'expected'), [('GenuineIntel', True), ('AuthenticAMD', False)])
def test_intel_is_told_by_its_vendor(vendor, expected, tmp_path, monkeypatch) -> None:
    info = tmp_path / 'cpuinfo'
    info.write_text(f'processor\t: 0\nvendor_id\t: {vendor}\nmodel name\t: \xe9\n', encoding='latin-1')
    monkeypatch.setattr(processor, '_CPUINFO', info)
    assert processor.is_intel_processor() == expected


@pytest.mark.parametrize('name', ['', 'AMD64 Family 25 Model 33 Stepping 0, AuthenticAMD', 'arm'])
def test_other_systems_than_linux(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(processor, '_CPUINFO', tmp_path / 'missing')
    monkeypatch.setattr(processor.platform, 'processor', lambda: name)
    assert not processor.is_intel_processor()


@pytest.mark.parametrize(
    ('flags', 'expected'),
    [
        ('flags : fpu avx2 amx_bf16 avx512_bf16', ['amx_bf16', 'avx512_bf16']),
        ('Features : fp asimd i8mm bf16', ['bf16']),
        ('flags : fpu avx2 avx512f', []),
    ],
)
def test_instructions_for_bfloat16(flags, expected, tmp_path, monkeypatch) -> None:
    info = tmp_path / 'cpuinfo'
    info.write_text(f'{flags}\n{flags}\n')
    monkeypatch.setattr(processor, '_CPUINFO', info)
    assert processor.bfloat16_instructions() == expected


@pytest.mark.parametrize('vendor', ['GenuineIntel', 'AuthenticAMD'])
@pytest.mark.parametrize('avx512', [True, False])
def test_mkl_suits_all_but_avx512_of_other_makers(avx512, vendor, tmp_path, monkeypatch) -> None:
    info = tmp_path / 'cpuinfo'
    info.write_text(f'vendor_id : {vendor}\nflags : fpu avx2 {"avx512f" if avx512 else ""}\n')
    expected = vendor == 'GenuineIntel' or not avx512
    monkeypatch.setattr(processor, '_CPUINFO', info)
    assert processor.is_mkl_tuned() == expected
    # Elsewhere than on Linux PyTorch's word is taken.
    monkeypatch.setattr(processor, '_CPUINFO', tmp_path / 'missing')
    monkeypatch.setattr(processor.platform, 'processor', lambda: vendor)
    monkeypatch.setattr(processor.torch.backends.cpu, 'get_cpu_capability', lambda: 'AVX512' if avx512 else 'AVX2')
    assert processor.is_mkl_tuned() == expected
