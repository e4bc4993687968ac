"""The compiled module as a file: what it shows, needs and tells, and how it is protected."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile

from mlp_ext import _C

ROOT = Path(__file__).parents[1]
FILE = Path(_C.__file__)

# Libraries of torch, and those that every Linux with a torch wheel has.
NEEDED = r"lib(torch\w*|c10\w*|gomp|cudart|stdc\+\+|m|gcc_s|c|pthread|dl)\.so.*|ld-linux.*"


@pytest.fixture(scope="module")
def elf() -> Iterator[ELFFile]:
    with FILE.open("rb") as file:
        yield ELFFile(file)


@pytest.fixture(scope="module")
def dynamic(elf: ELFFile) -> DynamicSection:
    return elf.get_section_by_name(".dynamic")


def test_only_the_module_is_exported(elf: ELFFile) -> None:
    """A symbol of torch's headers or of a static libstdc++ could take the place of torch's own."""
    symbols = elf.get_section_by_name(".dynsym").iter_symbols()
    assert [s.name for s in symbols if s["st_shndx"] != "SHN_UNDEF"] == ["PyInit__C"]


def test_libraries_are_those_of_torch_and_the_system(dynamic: DynamicSection) -> None:
    needed = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]
    assert "libc10.so" in needed
    assert [name for name in needed if not re.fullmatch(NEEDED, name)] == []


def test_libraries_are_looked_for_in_no_folder_of_the_build(dynamic: DynamicSection) -> None:
    assert [*dynamic.iter_tags("DT_RPATH"), *dynamic.iter_tags("DT_RUNPATH")] == []


def test_tables_of_functions_are_read_only(elf: ELFFile, dynamic: DynamicSection) -> None:
    """Symbols are bound as the module is loaded; then their table, and code, are read-only."""
    flags = {tag.entry.d_tag: tag.entry.d_val for tag in dynamic.iter_tags()}
    assert flags["DT_FLAGS"] & 0x8  # DF_BIND_NOW
    assert flags["DT_FLAGS_1"] & 0x1  # DF_1_NOW
    assert "DT_TEXTREL" not in flags
    segments = {segment.header.p_type: segment.header.p_flags for segment in elf.iter_segments()}
    assert "PT_GNU_RELRO" in segments
    assert not segments["PT_GNU_STACK"] & 0x1  # executable
    assert not [s for s in elf.iter_segments("PT_LOAD") if s.header.p_flags & 0x3 == 0x3]


def test_stack_is_checked(elf: ELFFile) -> None:
    names = {symbol.name for symbol in elf.get_section_by_name(".dynsym").iter_symbols()}
    assert "__stack_chk_fail" in names  # -fstack-protector; _FORTIFY_SOURCE may leave no trace


def test_no_folder_of_the_build_is_told() -> None:
    """Assertions print the names of source files."""
    told = FILE.read_bytes()
    assert b"csrc/cpu/train.cpp" in told
    folders = {ROOT, Path(torch.__file__).parents[1], Path(sys.prefix), Path.home()}
    folders |= {folder.resolve() for folder in folders}
    folders -= {Path("/")}  # which is the home of some users
    assert [str(folder) for folder in folders if str(folder).encode() + b"/" in told] == []
