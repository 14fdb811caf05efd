"""The meta-laws: every law sees a fault (M1), and the registry is whole (M2)."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import pkgutil
from pathlib import Path

import pytest

import filterwise as fw
from filterwise import functional
from filterwise.methods.method import Method
from filterwise.methods.registry import METHODS
from support.cases import CASES, Subject
from support.laws import LAWS
from support.model_faults import FAULTS
from support.mutants import MUTANTS

HERE = Path(__file__).parent
for path in sorted(HERE.glob("test_*.py")):
    if path.name != "test_meta.py":
        importlib.import_module(f"laws.{path.stem}")  # each enters its laws

BITES = [
    pytest.param(name, fault, id=f"{name}-{fault}")
    for name, one in LAWS.items()
    for fault in one.rejects
]


@pytest.mark.parametrize(("name", "fault"), BITES)
def test_m1_every_law_bites(name, fault):
    """A law that holds for what is right must fail for what is wrong."""
    one = LAWS[name]
    subject = one.subjects.get(one.rejects[fault])
    if isinstance(subject, Subject):
        with pytest.raises((AssertionError, RuntimeError)):
            one.test(subject.with_kernel(MUTANTS[fault]))
    else:
        with FAULTS[fault](), pytest.raises((AssertionError, RuntimeError, KeyError)):
            one.test(*([] if subject is None else [subject]))


def test_m1_every_law_names_a_fault_and_every_fault_is_named():
    silent = [name for name, one in LAWS.items() if not one.rejects]
    assert not silent
    used = {fault for one in LAWS.values() for fault in one.rejects}
    assert used == {*MUTANTS, *FAULTS}


def test_m1_no_law_is_missing():
    elsewhere = {33: HERE.parent / "test_import.py"}
    assert all(path.exists() for path in elsewhere.values())
    numbers = {one.number for one in LAWS.values()} | set(elsewhere)
    assert numbers == set(range(1, 35))


def method_classes():
    """Return the concrete methods that stand in files of the room, registered or not."""
    found = []
    for info in pkgutil.iter_modules([str(Path(inspect.getfile(Method)).parent)]):
        module = importlib.import_module(f"filterwise.methods.{info.name}")
        found += [
            cls
            for cls in vars(module).values()
            if inspect.isclass(cls)
            and issubclass(cls, Method)
            and cls.__module__ == module.__name__
            and not inspect.isabstract(cls)
        ]
    return found


def test_m2_every_method_is_registered_once_under_its_name():
    classes = [cls for cls in method_classes() if hasattr(cls, "name")]
    assert sorted(cls.name for cls in classes) == sorted(METHODS)
    assert set(METHODS.values()) == set(classes)
    assert [info.name for info in fw.methods()] == list(METHODS)


@pytest.mark.parametrize("name", METHODS)
def test_m2_every_entry_is_whole(name):
    """Formula, source, options, a public class and function, a parity test, a place in the laws."""
    cls = METHODS[name]
    assert dataclasses.is_dataclass(cls)
    assert cls.__dataclass_params__.frozen
    for field in (cls.title, cls.source, cls.formula, cls.__doc__):
        assert isinstance(field, str)
        assert field.strip()
    assert getattr(fw, cls.__name__) is cls
    assert cls.__name__ in fw.__all__
    words = "".join(f"_{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("_")
    assert callable(getattr(functional, words))
    assert words in functional.__all__
    text = "".join(path.read_text() for path in (HERE.parent / "parity").glob("test_*.py"))
    assert words in text, f"no parity test names {words}"
    assert name in {case.name for case in CASES}
