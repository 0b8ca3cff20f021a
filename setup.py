"Packaging: everything is read from settings.ini, the one place for version and dependencies."
from configparser import ConfigParser
from pathlib import Path

from setuptools import Distribution, find_packages, setup


class WithData(Distribution):
    "`pip install -e` asks it by this name whether there are data files, and else leaves them out."
    has_data = Distribution.has_data_files


here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
cfg = config["DEFAULT"]
readme = here / "README.md"

setup(
    distclass=WithData,
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    packages=find_packages(include=["dynad", "dynad.*"]),
    # an extension of the Jupyter server: the tracked notebooks of nbs/apps keep their outputs (nbs/18aa_saving.ipynb)
    data_files=[("etc/jupyter/jupyter_server_config.d", ["dynad/templates/dynad.json"])],
    package_data={"dynad": ["weights/*.safetensors", "weights/*.json", "*.csv", "templates/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={
        "dev": cfg["dev_requirements"].split(),
        "heif": cfg["extra_heif"].split(),
        "faiss-cpu": cfg["extra_faiss_cpu"].split(),
        "faiss-gpu": cfg["extra_faiss_gpu"].split(),
        "open": cfg["extra_open"].split(),
        "baselines": cfg["extra_baselines"].split(),
        "export": cfg["extra_export"].split(),
        "serve": cfg["extra_serve"].split(),
    },
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    zip_safe=False,
)
