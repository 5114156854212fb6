from setuptools import find_packages, setup

roots = {
    "lit_methods": "lit_methods",
    "lit_methods.callbacks": "callbacks",
    "lit_methods.datamodules": "datamodules",
    "lit_methods.configs": "configs",
}
packages = [name for name, folder in roots.items()] + [f"{name}.{sub}" for name, folder in roots.items() for sub in find_packages(folder)]
setup(package_dir=roots, packages=packages)
