"""Files and functions stay short, or say why not."""

from __future__ import annotations

from tests import structure


def test_what_is_long_has_a_reason_and_no_reason_is_left_over() -> None:
    assert structure.long_files().keys() == structure.LONG_FILES.keys()
    assert structure.long_functions().keys() == structure.LONG_FUNCTIONS.keys()


def test_lines_of_a_function_are_counted() -> None:
    source = "class A:\n    def f(self):\n        return 1\n\n\nasync def g():\n    pass\n"
    assert dict(structure.functions(source)) == {"f": 2, "g": 2}
