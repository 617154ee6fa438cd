"""Builds libkanbanlock.so with cargo and puts it into the wheel, which is then for this platform and any Python 3."""

import os
import pathlib
import subprocess
import sysconfig

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class ExtensionBuildHook(BuildHookInterface):
    def initialize(self, version, build_data):
        workspace = pathlib.Path(self.root).parent
        if not (workspace / "extension/Cargo.toml").exists():
            raise RuntimeError("no extension/Cargo.toml beside this folder: install from a checkout of kanbanlock")
        target = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", workspace / "target")).resolve()
        cargo = ["cargo", "build", "--locked", "--release", "-p", "kanbanlock-extension", "--target-dir", str(target)]
        try:
            subprocess.run(cargo, cwd=workspace, check=True)
        except FileNotFoundError:
            raise RuntimeError("cargo is needed to build kanbanlock, and is not there: https://rustup.rs") from None
        library = target / "release/libkanbanlock.so"
        # "editable" is `pip install -e`: then the package is used from its folder, and the library must be in it.
        if version == "editable":
            (pathlib.Path(self.root) / "src/kanbanlock/libkanbanlock.so").write_bytes(library.read_bytes())
        else:
            build_data["force_include"][str(library)] = "kanbanlock/libkanbanlock.so"
        build_data["pure_python"] = False
        build_data["tag"] = "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")
