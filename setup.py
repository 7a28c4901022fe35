"""For tools that still ask for it: all metadata is in setup.cfg."""

from setuptools import setup

setup()
