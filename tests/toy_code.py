"""Python packages that tests of the corpus and of prompts make themselves."""

import pandas as pd

MODULE = '''"""Module {n} of {package}."""

TABLE_{n} = {{
    "zero": {n},
    "one": {n} + 1,
    "two": {n} + 2,
    "three": {n} + 3,
    "four": {n} + 4,
    "five": {n} + 5,
    "six": {n} + 6,
    "seven": {n} + 7,
    "eight": {n} + 8,
    "nine": {n} + 9,
}}


def prepare_{n}_{package}(values):
    values = list(values)
    return values


def scale_{n}_{package}(values, factor={n}):
    """Multiply every one of the values by the factor {n}, and keep their order."""
    result = []
    for value in values:
        result.append(value * factor)
    return result


class Counter_{n}_{package}:
    """Counts things."""

    def __init__(self):
        self.total = {n}

    def add(self, amount):
        self.total += amount
        return self.total

    def remove(self, amount):
        self.total -= amount
        return self.total

    def reset(self):
        self.total = {n}
'''
TEST = """from {package}.m{n} import scale_{n}_{package}


def test_scale_{n}_{package}_keeps_order():
    prepare_{n}_{package}([1, 2, 3])
    assert scale_{n}_{package}([1, 2, 3], 2) == [2, 4, 6]
    assert sorted([3, 1]) == [1, 3]
"""


def write(root, package, path, text):
    """One file of a package on disk, as a row of environment_files' frame."""
    file = root / package / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return {"package": package, "version": "1.0", "path": path, "file": str(file)}


def code_files(root):
    """Frame of two packages, alpha and beta, of 4 modules with 2 tests each, and a train package."""
    rows = []
    for package in ("alpha", "beta"):
        for n in range(4):
            names = {"package": package, "n": n}
            rows.append(write(root, package, f"{package}/m{n}.py", MODULE.format(**names)))
            rows.append(write(root, package, f"{package}/tests/test_m{n}.py", TEST.format(**names)))
            rows.append(write(root, package, f"{package}/tests/test_again{n}.py", "import os\n" + TEST.format(**names)))
    rows.append(write(root, "gamma", "gamma/__init__.py", MODULE.format(package="gamma", n=77)))
    return pd.DataFrame(rows)
