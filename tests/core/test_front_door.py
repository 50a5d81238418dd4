"""A package's public names open its modules one by one."""

from __future__ import annotations

import sys

import pytest

from edgewise.core.front_door import front_door


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of two modules, importable."""
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop/__init__.py").write_text(
        "from edgewise.core.front_door import front_door\n"
        "__all__, __getattr__ = front_door(__name__, {'bread': 'rye Loaf', 'tea': 'green'})\n")
    (tmp_path / "shop/bread.py").write_text("rye = 1\nclass Loaf: pass\n")
    (tmp_path / "shop/tea.py").write_text("green = 2\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "shop"
    for name in [name for name in sys.modules if name.split(".")[0] == "shop"]:
        del sys.modules[name]


def test_a_module_is_imported_when_one_of_its_names_is_asked_for(package):
    shop = __import__(package)
    assert shop.__all__ == ["Loaf", "green", "rye"]
    assert {"shop.bread", "shop.tea"}.isdisjoint(sys.modules)
    assert shop.rye == 1
    assert shop.Loaf.__name__ == "Loaf"
    assert "shop.bread" in sys.modules
    assert "shop.tea" not in sys.modules


def test_other_names_are_refused_as_python_does():
    _, opened = front_door("shop", {"bread": "rye"})
    with pytest.raises(AttributeError, match="module 'shop' has no attribute 'wine'"):
        opened("wine")
