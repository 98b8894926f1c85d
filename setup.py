from setuptools import find_namespace_packages, setup

# flamingo_fast/{kernels,bench,profiling} are symlinks, so those folders install as
# flamingo_fast.kernels and so on, never as top-level packages: a top-level `kernels` breaks
# transformers beside Hugging Face's package of that name, `profiling` is in Python 3.15's library.
setup(
    packages=find_namespace_packages(
        include=["flamingo_fast", "flamingo_fast.*"],
        exclude=["flamingo_fast.bench.suite", "flamingo_fast.bench.results", "*.__pycache__"],
    ),
)
