"""The quick dataclass decorator does what the standard one does."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from dataclasses import field
from typing import Any, ClassVar

import pytest

from edgewise.core import values


def both(**options: Any) -> Any:
    """One class by each decorator."""
    def made(decorator: Any) -> Any:
        @decorator
        class Point:
            """A point."""

            kind: ClassVar[str] = "point"
            x: int
            y: float = 2.0
            tags: tuple[str, ...] = field(default=(), compare=False)
            more: list[int] = field(default_factory=list, hash=False, repr=False)
            total: float = field(init=False, default=0.0)

            def __post_init__(self) -> None:
                object.__setattr__(self, "total", self.x + self.y)

        return Point

    return made(values.dataclass(**options)), made(dataclasses.dataclass(**options))


@pytest.mark.parametrize("options", [{"frozen": True}, {"frozen": True, "eq": False}, {"frozen": True, "repr": False},
                                     {}, {"eq": False, "repr": False}])
@pytest.mark.parametrize("args", [((1,), {}), ((1, 3.0), {}), ((), {"x": 4}), ((1,), {"y": 5.0, "more": [1]}),
                                  ((1, 2.0, ("a",), [3]), {})])
def test_instances_are_as_the_standard_library_makes_them(options, args):
    (ours, again), (theirs, same) = ([cls(*args[0], **args[1]) for _ in range(2)] for cls in both(**options))
    assert dataclasses.asdict(ours) == dataclasses.asdict(theirs)
    assert [f.name for f in dataclasses.fields(ours)] == [f.name for f in dataclasses.fields(theirs)]
    assert (ours == again) == (theirs == same)
    assert (ours == dataclasses.replace(ours, tags=("b",))) == (theirs == dataclasses.replace(theirs, tags=("b",)))
    assert (ours != theirs) is True
    if options.get("repr", True):
        assert repr(ours) == repr(theirs)
    assert type(ours).__match_args__ == type(theirs).__match_args__
    if "eq" not in options and not options.get("frozen"):
        assert type(ours).__hash__ is None is type(theirs).__hash__
    elif "eq" not in options:
        assert hash(ours) == hash(theirs)
    assert copy.deepcopy(ours).__dict__ == ours.__dict__


@pytest.mark.parametrize("args", [((), {}), ((1, 2.0, (), [], 9.0), {}), ((1,), {"x": 2}), ((1,), {"z": 2}),
                                  ((1,), {"total": 2.0})])
def test_wrong_arguments_are_refused_by_both(args):
    for cls in both(frozen=True):
        with pytest.raises(TypeError):
            cls(*args[0], **args[1])


def test_a_frozen_instance_does_not_change():
    for cls in both(frozen=True):
        point = cls(1)
        for change in (lambda p=point: setattr(p, "x", 2), lambda p=point: delattr(p, "x"),
                       lambda p=point: setattr(p, "new", 2)):
            with pytest.raises(dataclasses.FrozenInstanceError):
                change()
        loose = type("Loose", (cls,), {})(1)
        loose.new = 2
        with pytest.raises(dataclasses.FrozenInstanceError):
            loose.x = 2
    changing = both()[0](1)
    changing.x = 5
    assert changing.x == 5


def test_methods_that_a_class_has_stay():
    @values.dataclass(frozen=True)
    class Named:
        name: str

        def __repr__(self) -> str:
            return self.name

        def __eq__(self, other: object) -> bool:
            return True

    assert repr(Named("a")) == "a"
    assert Named("a") == Named("b")
    assert hash(Named("a")) != hash(Named("b"))


def test_a_default_list_is_not_shared():
    cls = both(frozen=True)[0]
    first, second = cls(1), cls(2)
    first.more.append(3)
    assert second.more == []


def test_a_frozen_class_is_extended_by_frozen_ones():
    base = both(frozen=True)[0]

    @dataclasses.dataclass(frozen=True)
    class Further(base):  # type: ignore[misc, valid-type]
        z: int = 3

    assert (Further(1).z, Further(1, z=4).z, Further(1).total) == (3, 4, 3.0)
    with pytest.raises(TypeError, match="non-frozen"):
        dataclasses.dataclass(type("Changing", (base,), {}))
    with pytest.raises(TypeError, match="extends a dataclass"):
        values.dataclass(frozen=True)(type("Second", (base,), {}))


def test_declarations_that_are_wrong_are_refused():
    for decorator in (values.dataclass, dataclasses.dataclass):
        with pytest.raises(TypeError, match="follows default"):
            decorator(type("Late", (), {"a": 1, "__annotations__": {"a": "int", "b": "int"}}))
        with pytest.raises(ValueError, match="mutable default"):
            decorator(type("Shared", (), {"a": [], "__annotations__": {"a": "list"}}))
    with pytest.raises(TypeError, match="keyword-only"):
        values.dataclass(type("Keyed", (), {"a": field(kw_only=True), "__annotations__": {"a": "int"}}))


def test_pickles():
    from edgewise.core.numbers import INT4
    from edgewise.core.workload import Op  # a standard one, beside ours

    assert pickle.loads(pickle.dumps(INT4)) == INT4
    assert dataclasses.is_dataclass(Op)
