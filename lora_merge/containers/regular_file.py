"""One regular file opened for reading by position: no mapping, no shared offset, no waiting on pipes."""

import errno
import os
import stat
from pathlib import Path

from lora_merge.containers.descriptors import Descriptor, is_lack
from lora_merge.errors import InputError, LoraMergeError, StorageError, UnsupportedError, printable

_INPUT_ERRNOS = {
    errno.ENOENT: "does not exist",
    errno.ENOTDIR: "does not exist: a part of the path is not a folder",
    errno.EACCES: "may not be read (permission denied); change its permissions",
    errno.EPERM: "may not be read (operation not permitted); change its permissions",
    errno.ELOOP: "is a loop of symbolic links",
    errno.ENAMETOOLONG: "is longer than the file system allows for a name",
    errno.ENXIO: "is not a regular file",
}


class RegularFile:
    """A regular file opened for reading; links are followed, everything that is not a file is refused.

    Reads are `preadv`s and safe from several threads. A file cut short while it is read gives an error message, where
    a mapping would end the process. The descriptor may be closed between two reads (`descriptors`); what is opened
    then must be the same file, unchanged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._place = os.path.join(_current(), path)  # the current folder may be another when it is opened again
        self._opened: os.stat_result | None = None
        self._descriptor = Descriptor(self._open)
        with self._descriptor.used() as number:
            self.size: int = os.fstat(number).st_size

    def read_into(self, offset: int, out: memoryview, what: str) -> None:
        """Fill `out` with the bytes from `offset` on; `what` names them in errors.

        InputError where the file ends before `out` is full, StorageError where the system cannot read.
        """
        with self._descriptor.used() as number:
            self._read_into(number, offset, out, what)

    def _read_into(self, number: int, offset: int, out: memoryview, what: str) -> None:
        done = 0
        while done < len(out):
            try:
                count = os.preadv(number, [out[done:]], offset + done)
            except OSError as error:
                raise StorageError(
                    f"{self}: {what}: reading at byte {offset + done} failed: {error.strerror}"
                ) from error
            if count == 0:
                raise InputError(
                    f"{self}: {what}: the file ends at byte {offset + done}, {len(out) - done} bytes too early; "
                    "it was cut short after it was opened, fetch it again"
                )
            done += count

    def read(self, offset: int, count: int, what: str) -> bytearray:
        """`count` bytes from `offset` on. The caller has bounded `count` by the size of the file."""
        out = bytearray(count)
        self.read_into(offset, memoryview(out), what)
        return out

    def check_unchanged(self) -> None:
        """InputError where the file is not the one that was opened, or was written since."""
        with self._descriptor.used() as number:
            self._check_same(os.fstat(number))

    def close(self) -> None:
        self._descriptor.close()

    def _open(self) -> int:
        """The file's descriptor, of which `check_unchanged` is true."""
        number = _open(self.path, self._place)
        try:
            found = os.fstat(number)
            if not stat.S_ISREG(found.st_mode):  # swapped between stat and open
                raise _not_regular(self.path, found.st_mode)
            if self._opened is None:
                self._opened = found
            self._check_same(found)
        except BaseException:
            os.close(number)
            raise
        return number

    def _check_same(self, now: os.stat_result) -> None:
        then = self._opened
        assert then is not None
        same = (now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns) == (
            (then.st_dev, then.st_ino, then.st_size, then.st_mtime_ns)
        )
        # A link made or removed moves ctime as well, and leaves the bytes alone.
        if not same or (now.st_ctime_ns != then.st_ctime_ns and now.st_nlink == then.st_nlink):
            raise InputError(
                f"{self}: the file was changed while it was read (size {then.st_size} -> {now.st_size}); "
                "the result would be a mixture, run again when nothing writes to it"
            )

    @property
    def stamp(self) -> tuple[int, ...]:
        """Names the file as it was when it was opened: no write to it leaves all of this as it is."""
        then = self._opened
        assert then is not None
        return then.st_dev, then.st_ino, then.st_size, then.st_mtime_ns, then.st_ctime_ns

    def __str__(self) -> str:
        return printable(self.path)


def _current() -> str:
    try:
        return os.getcwd()
    except OSError:  # removed: a relative path leads nowhere then
        return ""


def _open(path: Path, place: str) -> int:
    """Open `place`, which messages call `path`."""
    try:
        mode = os.stat(place).st_mode  # before opening: to open a device can have an effect
        if not stat.S_ISREG(mode):
            raise _not_regular(path, mode)
        return os.open(place, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise _refusal(path, error) from error
    except ValueError as error:  # NUL or a character that no file name can hold
        raise InputError(f"{printable(path)}: no file can have this name ({printable(error)})") from error


def _refusal(path: Path, error: OSError) -> LoraMergeError:
    reason = _INPUT_ERRNOS.get(error.errno or 0)
    if is_lack(error):
        return StorageError(f"{printable(path)}: cannot be opened: {error.strerror}; allow more with `ulimit -n`")
    if reason is None:
        return StorageError(f"{printable(path)}: opening failed: {error.strerror}")
    if error.errno == errno.ENOENT and path.is_symlink():
        reason = (
            f"is a link to {printable(os.readlink(path))}, which does not exist; the download is probably incomplete"
        )
    return InputError(f"{printable(path)}: {reason}")


def _not_regular(path: Path, mode: int) -> InputError:
    kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    return InputError(f"{printable(path)}: is {kind}; a regular file, or a link to one, is expected")


GGUF_ADVICE = (
    "GGUF is not read; give the folder of the model in safetensors that it was made from, and convert what is merged "
    "with llama.cpp"
)


def refuse_gguf(file: RegularFile, head: bytes | bytearray) -> None:
    """Raise UnsupportedError for a GGUF file, whatever its name; head: its first bytes."""
    if head[:4] == b"GGUF":
        raise UnsupportedError(f"{file}: {GGUF_ADVICE}")
