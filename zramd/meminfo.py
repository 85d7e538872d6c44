"""What the kernel says of this machine's memory (/proc/meminfo), for all that need a number of it."""

PATH = "/proc/meminfo"


def read(name: str, path: str = PATH) -> int | None:
    """Return one of its amounts in bytes, such as MemTotal; None if the file has none of that name.

    Raises OSError when it cannot be read.
    """
    with open(path, errors="replace") as file:
        for line in file:
            key, _, value = line.partition(":")
            number, _, unit = value.strip().partition(" ")
            if key == name and number.isascii() and number.isdigit() and unit == "kB":
                return int(number) << 10
    return None
