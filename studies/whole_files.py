"""Files that are there complete or not at all, however a study is interrupted: checkpoints and states."""

import os


def write_whole(path, write):
    """Write a file beside its place, and move it there when all of it is on the disk.

    Args:
        path: Where the file shall be; its folder is made if need be.
        write: A function that writes to an open binary file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
