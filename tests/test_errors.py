"""Errors cross process borders whole: type, message and fields."""

import pickle

import pytest

from fastkd.errors import MissingDependency, RecipeError, RecipeErrors, UserError, WorkerError


@pytest.mark.parametrize(
    "error",
    [
        UserError("policy.model_name", "no such folder", "Give one", value="x"),
        RecipeErrors([RecipeError("a", "wrong"), RecipeError("b", "wrong too", value=None)]),
        MissingDependency("ray", "not installed", "pip install ray"),
        WorkerError("teacher", 2, ValueError("x")),
    ],
)
def test_pickled(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error)
    assert again.__dict__.keys() == error.__dict__.keys()
