"""Files that are there complete or not at all, however a study is interrupted."""

import os


def write_whole(path, write):
    """Write a file beside its place, and move it there when all of it is on the disk.

    Args:
        path: Where the file shall be.
        write: A function that writes to an open binary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
