"""Reads the shell configurations of Megatron's QAD scripts and says what they are in a recipe."""

from fastkd.conf.convert import convert
from fastkd.conf.draft import Conversion
from fastkd.conf.shell import Assignment, ShellFile, read_shell

__all__ = ["Assignment", "Conversion", "ShellFile", "convert", "read_shell"]
