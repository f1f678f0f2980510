"""What the package is called where it is installed from; `selfheal` is another project there."""

import os

DISTRIBUTION = "selfheal-uploads"


def is_mixed(site: str) -> bool:
    """Whether the other project is installed in the directory `site`: its files and ours share a package there."""
    try:
        names = os.listdir(site)
    except OSError:  # imported from an archive
        return False
    return any(name.startswith("selfheal-") and name.endswith((".dist-info", ".egg-info")) for name in names)


if is_mixed(os.path.dirname(os.path.dirname(__file__))):
    import logging

    logging.getLogger("selfheal").warning(
        f"the installed distribution `selfheal` is another project with files of the same names; run "
        f"`pip uninstall selfheal`, then `pip install --force-reinstall --no-deps {DISTRIBUTION}`"
    )
