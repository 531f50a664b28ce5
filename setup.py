"""The metadata stands in pyproject.toml; this file is the place of the C++ extension."""

from setuptools import setup

setup()
