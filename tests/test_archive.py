"""Downloads and archives: all or nothing, and one clear sentence when it is nothing."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import socket
import stat
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from official_host import OfficialHost

from quant import archive
from quant.archive import console_progress, download, staged, unpack
from quant.errors import InputError, Unavailable


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def files_below(folder: Path) -> list[str]:
    """Files in a folder, without the locks of downloads."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    return sorted(str(path) for path in files if ".locks" not in path.parts)


def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(archive, "_unreachable", {})


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


BODY = os.urandom(1_000_000)


def test_a_download_is_verified_and_not_repeated(host: OfficialHost, tmp_path: Path) -> None:
    url = host.put("/a.tar", BODY)
    steps: list[tuple[str, int, int | None]] = []
    first = download(url, sha256(BODY), tmp_path, lambda *step: steps.append(step))
    assert first.read_bytes() == BODY
    assert steps[-1] == ("downloading a.tar", len(BODY), len(BODY))
    assert len(set(steps)) == len(steps)
    assert download(url, sha256(BODY), tmp_path) == first
    assert host.requests == ["/a.tar"]
    assert files_below(tmp_path) == [first.name]


def test_the_first_download_is_pinned(host: OfficialHost, tmp_path: Path) -> None:
    url = host.put("/a.tar", BODY)
    path = download(url, None, tmp_path)
    pin = path.with_name(path.name + ".pin.json")
    assert json.loads(pin.read_text()) == {"url": url, "sha256": sha256(BODY)}
    path.unlink()
    assert download(url, None, tmp_path) == path
    path.unlink()
    host.put("/a.tar", b"another")
    with pytest.raises(InputError, match=r"changed since its first download.*delete .*pin\.json"):
        download(url, None, tmp_path)
    assert files_below(tmp_path) == [pin.name]


def test_an_unreadable_pin_is_not_ignored(host: OfficialHost, tmp_path: Path) -> None:
    url = host.put("/a.tar", BODY)
    (tmp_path / f"{archive.archive_name(url)}.pin.json").write_text("{")
    with pytest.raises(InputError, match="delete it"):
        download(url, None, tmp_path)
    assert host.requests == []


def test_a_wrong_checksum_is_refused(host: OfficialHost, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wrong checksum") as caught:
        download(host.put("/a.tar", BODY), "0" * 64, tmp_path)
    assert not isinstance(caught.value, Unavailable)
    assert files_below(tmp_path) == []


def test_a_cut_off_body_is_refused(host: OfficialHost, tmp_path: Path) -> None:
    host.cut_off.add("/a.tar")
    with pytest.raises(Unavailable, match="broke off"):
        download(host.put("/a.tar", BODY), None, tmp_path)
    assert files_below(tmp_path) == []


def test_a_missing_file_is_named(host: OfficialHost, tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="404"):
        download(f"{host.url}/a.tar", None, tmp_path)
    assert files_below(tmp_path) == []


def test_an_unreachable_host_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    connect = socket.create_connection

    def counted(*args: Any, **kwargs: Any) -> socket.socket:
        asked.append(args)
        return connect(*args, **kwargs)

    monkeypatch.setattr(socket, "create_connection", counted)
    url = f"http://127.0.0.1:{unused_port()}"
    for name in ("a.tar", "b.tar"):
        with pytest.raises(Unavailable, match="cannot be reached") as caught:
            download(f"{url}/{name}", None, tmp_path)
        assert "network" in caught.value.fix
    assert len(asked) == 1
    assert files_below(tmp_path) == []


def test_a_silent_name_server_costs_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()

    def hang(*args: Any, **kwargs: Any) -> None:
        over.wait(20)
        raise OSError("too late")

    monkeypatch.setattr(archive, "CONNECT_SECONDS", 0.1)
    monkeypatch.setattr(socket, "create_connection", hang)
    started = time.monotonic()
    with pytest.raises(Unavailable, match="no answer"):
        download("https://host.invalid/a.tar", None, tmp_path)
    assert time.monotonic() - started < 10
    over.set()


def test_a_proxy_is_probed_instead_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://proxy.invalid:3128")
    monkeypatch.delenv("NO_PROXY")
    assert archive._peer("https://host.invalid/a.tar") == ("proxy.invalid", 3128)


@pytest.mark.parametrize("url", ["http:///a.tar", "https://host:port/a.tar", "ftp://host/a.tar", "https://host/"])
def test_an_address_that_is_none(url: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected"):
        download(url, None, tmp_path)


def test_a_folder_that_cannot_be_written(host: OfficialHost, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Unavailable, match="cannot be stored") as caught:
        download(host.put("/a.tar", BODY), None, tmp_path / "file" / "downloads")
    assert "QUANT_CACHE" in caught.value.fix


def no_space(*args: Any, **kwargs: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def interrupt(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def test_a_broken_download_goes_on(host: OfficialHost, tmp_path: Path) -> None:
    url = host.put("/a.tar", BODY)
    host.tags["/a.tar"] = '"one"'
    host.cut_off.add("/a.tar")
    for _ in range(2):
        with pytest.raises(Unavailable, match="broke off"):
            download(url, sha256(BODY), tmp_path)
        archive._unreachable.clear()
    host.cut_off.clear()
    told: list[int] = []
    path = download(url, sha256(BODY), tmp_path, lambda what, done, total: told.append(done))
    assert path.read_bytes() == BODY
    starts = [int(wanted.removeprefix("bytes=").removesuffix("-")) for wanted in host.ranges]
    assert 0 < starts[0] < starts[1] < len(BODY), "each attempt begins where the one before broke off"
    assert told[0] > starts[1] and told[-1] == len(BODY)
    assert files_below(tmp_path) == [path.name]


def test_a_download_killed_at_its_end_needs_no_byte_more(host: OfficialHost, tmp_path: Path) -> None:
    url = host.put("/a.tar", BODY)
    host.tags["/a.tar"] = '"one"'
    part = tmp_path / f"{archive.archive_name(url)}.part"
    part.write_bytes(BODY)
    part.with_name(f"{part.name}.json").write_text('{"mark": "\\"one\\""}')
    assert download(url, sha256(BODY), tmp_path).read_bytes() == BODY
    assert host.ranges == [f"bytes={len(BODY)}-"]


@pytest.mark.parametrize("careless", [False, True])
def test_parts_of_two_versions_do_not_meet(host: OfficialHost, tmp_path: Path, careless: bool) -> None:
    host.careless = careless
    url = host.put("/a.tar", BODY)
    host.tags["/a.tar"] = '"one"'
    host.cut_off.add("/a.tar")
    with pytest.raises(Unavailable):
        download(url, None, tmp_path)
    archive._unreachable.clear()
    host.cut_off.clear()
    newer = os.urandom(600_000)
    host.put("/a.tar", newer)
    host.tags["/a.tar"] = '"two"'
    assert download(url, None, tmp_path).read_bytes() == newer


@pytest.mark.parametrize("tag", [None, 'W/"one"'])
def test_where_the_server_names_no_version_nothing_is_kept(host: OfficialHost, tmp_path: Path, tag: str | None) -> None:
    url = host.put("/a.tar", BODY)
    if tag:
        host.tags["/a.tar"] = tag
    host.cut_off.add("/a.tar")
    with pytest.raises(Unavailable):
        download(url, None, tmp_path)
    assert files_below(tmp_path) == []


def test_a_full_disk_during_the_download(host: OfficialHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.move", no_space)
    with pytest.raises(Unavailable, match="No space left"):
        download(host.put("/a.tar", BODY), None, tmp_path)
    assert files_below(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(host: OfficialHost, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        download(host.put("/a.tar", BODY), None, tmp_path, interrupt)
    assert files_below(tmp_path) == []


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in files.items():
            file.writestr(name, content)
    return buffer.getvalue()


MAKERS: list[Callable[[dict[str, bytes]], bytes]] = [tar_of, lambda files: tar_of(files, "w:gz"), zip_of]


@pytest.mark.parametrize("make", MAKERS)
def test_a_good_archive(make: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(make({"./top/x.txt": b"x", "top/in/y.txt": b"y", "._top": b"junk"}))
    unpack(tmp_path / "a", tmp_path / "out" / "b")
    assert files_below(tmp_path / "out") == ["b/in/y.txt", "b/x.txt"]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("name", ["../x", "top/../../x", "/x", "top\\..\\x", "C:/x"])
def test_paths_that_lead_out(make: Callable[[dict[str, bytes]], bytes], name: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(make({"top/good": b"", name: b"bad"}))
    with pytest.raises(InputError, match="not safe to unpack"):
        unpack(tmp_path / "a", tmp_path / "out" / "b")
    assert files_below(tmp_path) == ["a"]


def tar_with(kind: bytes, name: str, link: str = "") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        member = tarfile.TarInfo("top/file")
        member.size = 4
        tar.addfile(member, io.BytesIO(b"text"))
        special = tarfile.TarInfo(name)
        special.type, special.linkname = kind, link
        tar.addfile(special)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "link"),
    [
        (tarfile.SYMTYPE, "../../etc/passwd"),
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "missing"),
        (tarfile.SYMTYPE, "."),
        (tarfile.LNKTYPE, "../file"),
        (tarfile.LNKTYPE, "/etc/passwd"),
        (tarfile.CHRTYPE, ""),
        (tarfile.FIFOTYPE, ""),
    ],
)
def test_links_out_and_devices(kind: bytes, link: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(tar_with(kind, "top/bad", link))
    with pytest.raises(InputError, match="not safe to unpack"):
        unpack(tmp_path / "a", tmp_path / "b")
    assert files_below(tmp_path) == ["a"]


@pytest.mark.parametrize(("kind", "link"), [(tarfile.SYMTYPE, "file"), (tarfile.LNKTYPE, "top/file")])
def test_a_link_inside_becomes_a_copy(kind: bytes, link: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(tar_with(kind, "top/copy", link))
    unpack(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b" / "copy").read_bytes() == b"text"
    assert not (tmp_path / "b" / "copy").is_symlink()


def test_a_zip_with_a_link_out(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("top/bad")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a", "w") as file:
        file.writestr(link, "../../etc/passwd")
    with pytest.raises(InputError, match="leads out"):
        unpack(tmp_path / "a", tmp_path / "b")
    assert files_below(tmp_path) == ["a"]


@pytest.mark.parametrize("make", MAKERS)
def test_a_bomb(make: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(make({f"top/{number}": bytes(1000) for number in range(10)}))
    with pytest.raises(InputError, match="more than 5000 bytes"):
        unpack(tmp_path / "a", tmp_path / "b", max_bytes=5000)
    with pytest.raises(InputError, match="more than 5 entries"):
        unpack(tmp_path / "a", tmp_path / "b", max_files=5)
    assert files_below(tmp_path) == ["a"]


def test_a_damaged_xz_archive(tmp_path: Path) -> None:
    good = tar_of({"top/file": BODY[:5000]}, "w:xz")
    (tmp_path / "a.tar").write_bytes(good[:200] + bytes(100) + good[300:])
    with pytest.raises(InputError):
        unpack(tmp_path / "a.tar", tmp_path / "out")


@pytest.mark.parametrize("make", MAKERS)
def test_a_cut_off_archive(make: Callable[[dict[str, bytes]], bytes], tmp_path: Path) -> None:
    whole = make({"top/x": BODY[:100_000]})
    (tmp_path / "a").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cut off or damaged"):
        unpack(tmp_path / "a", tmp_path / "b")
    assert files_below(tmp_path) == ["a"]


def test_a_full_disk_while_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(tar_of({"top/x": b"x"}))
    monkeypatch.setattr("shutil.copyfileobj", no_space)
    with pytest.raises(Unavailable, match="No space left"):
        unpack(tmp_path / "a", tmp_path / "b")
    assert files_below(tmp_path) == ["a"]


def test_an_interrupted_unpacking_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_bytes(tar_of({"top/x": b"x"}))
    monkeypatch.setattr("shutil.copyfileobj", interrupt)
    with pytest.raises(KeyboardInterrupt):
        unpack(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]


def test_the_faster_process_wins(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with staged(target) as mine:
        mine.mkdir()
        (mine / "x").write_text("mine")
        with staged(target) as other:
            other.mkdir()
            (other / "x").write_text("other")
    assert (target / "x").read_text() == "other"
    assert os.listdir(tmp_path) == ["b"]


def test_plain_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with console_progress() as progress:
        for done in range(5):
            progress("counting", done, 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == ["counting: 0 of 4 (0 %)", "counting: 4 of 4 (100 %)"]


def test_a_bar_on_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with console_progress() as progress:
        progress("counting", 1, None)
        progress("counting", 4, 4)
    out, err = capsys.readouterr()
    assert out == ""
    assert "counting" in err
