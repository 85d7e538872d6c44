"""Each public name says what it is for, what it raises, and in which units; algorithms, where they are from.

A machine sees whether it is said; whether it is said well is for people to judge.
"""

import re

import pytest
from support.docstrings import CYTHON, PACKAGE, PYTHON, ROOT, faults, in_cython, in_python, stub_of

# Modules with an algorithm that others thought of, or made for measured reasons: what their heads must name.
SOURCES = {
    "core/pool/pool.pyx": r"mm/zsmalloc\.c",
    "core/pool/compaction.pyx": r"mm/zsmalloc\.c",
    "core/pool/lending.pyx": r"docs/density\.md",
    "core/pool/size_classes.pyx": r"mm/zsmalloc\.c",
    "core/pool/zspages.pxd": r"mm/zsmalloc\.c",
    "core/device/codec.pyx": r"(?s)drivers/block/zram.*lz4",
    "core/device/checksum.pyx": r"(?s)Castagnoli.*xxHash",
    "core/device/recovery.pyx": r"crash rule of pool\.pyx",
    "core/device/saving.pyx": r"docs/save-format\.md",
    "core/system/latency.pxd": r"log2 histograms",
    "core/system/gate.pxd": r"(?i)reader-writer lock",
    "server/compactor.py": r"zsmalloc",
    "stats/buckets.py": r"histogram_quantile",
    "kernel/netlink.py": r"(?s)doc/proto\.md.*nbd-netlink\.h",
    "settings/expression.py": r"zram-generator",
}


def test_each_public_name_says_what_it_owes() -> None:
    found = [(path, fault) for path in PYTHON for fault in faults(in_python(path.read_text()))]
    found += [
        (path, fault) for path in CYTHON for fault in faults(in_cython(path.read_text(), stub_of(path)))
    ]
    assert not found, "\n".join(f"{path.relative_to(ROOT)}: {fault}" for path, fault in found)


@pytest.mark.parametrize("name", SOURCES)
def test_an_algorithm_names_its_source(name: str) -> None:
    text = (PACKAGE / name).read_text()
    assert text.startswith('"""')
    head = text.split('"""')[1]
    assert re.search(SOURCES[name], head), f"{name}: the head names no {SOURCES[name]}"


def test_the_search_reads_the_whole_package() -> None:
    assert len(PYTHON) > 50
    assert len(CYTHON) > 10
    said = [each for path in PYTHON for each in in_python(path.read_text())]
    said += [each for path in CYTHON for each in in_cython(path.read_text(), stub_of(path))]
    assert len(said) > 500
    assert sum(bool(each.raises) for each in said) > 60
    assert sum(bool(each.amounts) for each in said) > 30


MODULE = '"""M."""\nfrom zramd.errors import StateError\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("x = 1", "the module has no docstring"),
        ('"""M."""\ndef f(): pass', "f has no docstring"),
        ('"""M."""\nclass C:\n    """C."""\n    def m(self): pass', "C.m has no docstring"),
        (
            MODULE + 'def f():\n    """F."""\n    raise StateError("x")',
            "f raises StateError and does not say so",
        ),
        (
            MODULE + 'def f():\n    """F."""\n    if 1:\n        raise ValueError',
            "f raises ValueError and does not say so",
        ),
        (
            # One that is caught says nothing of one that the handler raises.
            MODULE
            + 'def f():\n    """F."""\n    try:\n        pass\n    except OSError:\n        raise StateError',
            "f raises StateError and does not say so",
        ),
        (
            MODULE + 'class C:\n    """C."""\n    def __init__(self):\n        raise StateError("x")',
            "C raises StateError and does not say so",
        ),
        ('"""M."""\ndef f(size: int):\n    """F."""', "f says no unit of size"),
        ('"""M."""\ndef f(*, start_timeout=1):\n    """F."""', "f says no unit of start_timeout"),
        ('"""M."""\ndef age() -> float:\n    """F."""', "age says no unit of age"),
        ('"""M."""\nclass C:\n    """C."""\n    age: float', "C.age says no unit of age"),
        ('"""M."""\nTIMEOUT = 3  # until we give up', "TIMEOUT says no unit of TIMEOUT"),
    ],
)
def test_a_fault_in_python_is_found(text: str, fault: str) -> None:
    assert faults(in_python(text)) == [fault]


@pytest.mark.parametrize(
    "text",
    [
        MODULE + 'def f():\n    """Raises StateError."""\n    raise StateError("x")',
        MODULE
        + 'def f():\n    """F."""\n    try:\n        raise StateError\n    except ZramdError:\n        pass',
        MODULE + 'def f():\n    """F."""\n    def g():\n        raise StateError("x")',
        MODULE + 'def _f():\n    raise StateError("x")',
        MODULE
        + 'class C:\n    """C. Raises StateError."""\n    def __init__(self):\n        raise StateError("x")',
        MODULE
        + 'def f():\n    """Raises StateError."""\ndef g():\n    """Raises as `f`."""\n    raise StateError',
        '"""M."""\nclass P(Protocol):\n    """P."""\n    def m(self): ...',
        '"""M."""\ndef f(size: int, message: str):\n    """F. size: bytes."""',
        '"""M."""\ndef f(size: os.terminal_size, max_bytes: int):\n    """F."""',
        '"""M."""\nclass C:\n    """C."""\n    age: float  # seconds',
        '"""M."""\n# Seconds until we give up, as in 3 s.\nTIMEOUT = 3',
    ],
)
def test_what_is_said_is_no_fault_in_python(text: str) -> None:
    assert faults(in_python(text)) == []


@pytest.mark.parametrize(
    ("text", "stub", "fault"),
    [
        ("cdef int x", "", "the module has no docstring"),
        ('"""M."""\ndef f(size_t a,\n      b=(1, 2)):\n    return 1\n', "", "f has no docstring"),
        (
            '"""M."""\ncdef class C:\n    """C."""\n    def m(self):\n        pass\n',
            "",
            "C.m has no docstring",
        ),
        (
            '"""M."""\ndef f():\n    """F."""\n    if 1:\n        raise OSError(1, "x")\n',
            "",
            "f raises OSError and does not say so",
        ),
        (
            '"""M."""\ncdef class C:\n    """C."""\n    def __cinit__(self):\n        raise OSError(1)\n',
            "",
            "C.__cinit__ raises OSError and does not say so",
        ),
        ('"""M."""\ndef f(size):\n    """F."""\n', "def f(size: int) -> None: ...", "f says no unit of size"),
        (
            '"""M."""\ncdef class C:\n    """C."""\n    def m(self, offset):\n        """M."""\n',
            "class C:\n    def m(self, offset: int) -> None: ...",
            "C.m says no unit of offset",
        ),
    ],
)
def test_a_fault_in_cython_is_found(text: str, stub: str, fault: str) -> None:
    assert faults(in_cython(text, stub)) == [fault]


def test_what_is_said_is_no_fault_in_cython() -> None:
    assert faults(in_cython('"""M."""\ncdef int g() noexcept nogil:\n    return 1\n')) == []
    text = '"""M."""\ndef f(size):\n    """size: bytes. Raises OSError."""\n    raise OSError(1, "x")\n'
    assert faults(in_cython(text, "def f(size: int) -> None: ...")) == []
