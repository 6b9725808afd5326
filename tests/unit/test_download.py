"""Downloads and zips: from a server that breaks off, forgets, refuses and lies, onto disks that are full."""

from __future__ import annotations

import hashlib
import socket
import stat
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from faulty_server import BODY, Server, full_disk, serving, zipped

from efficap.data.prepare.archives import unpack
from efficap.data.prepare.download import Remote, fetch
from efficap.errors import InputError


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def have(remote: Remote, folder: Path, **how: Any) -> bytes:
    [file] = fetch([remote], folder, pause=0.001, **how)
    assert sorted(path.name for path in folder.iterdir()) == [remote.name]
    return file.read_bytes()


def refusal(*remotes: Remote, folder: Path, **how: Any) -> str:
    with pytest.raises(InputError) as caught:
        fetch(remotes, folder, pause=0.001, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_files_are_downloaded_once(server: Server, tmp_path: Path) -> None:
    remotes = [server.remote(f"{n}.bin", BODY[: n * 1000]) for n in range(6)]
    for _ in range(2):
        files = fetch(remotes, tmp_path / "new")
        assert [file.read_bytes() for file in files] == [BODY[: n * 1000] for n in range(6)]
        assert all(len(server.gets(remote.name)) == 1 for remote in remotes)


@pytest.mark.parametrize("resets", [False, True], ids=["ends", "is reset"])
def test_a_connection_that_breaks_is_taken_up_where_it_ended(
    resets: bool, server: Server, tmp_path: Path
) -> None:
    remote = server.remote("a.bin", breaks=[300_000, 0, 200_000], resets=resets)
    assert have(remote, tmp_path) == BODY
    starts = [int((wanted or "bytes=0-")[6:-1]) for wanted in server.gets("a.bin")]
    assert len(starts) == 4
    assert starts == sorted(starts)
    if not resets:  # a reset may swallow what was under way
        assert starts == [0, 300_000, 300_000, 500_000]


def test_a_line_that_breaks_often_does_not_matter_while_it_gets_further(
    server: Server, tmp_path: Path
) -> None:
    assert have(server.remote("a.bin", breaks=[50_000] * 20), tmp_path, attempts=2) == BODY


def test_a_server_without_ranges_is_asked_for_the_whole(server: Server, tmp_path: Path) -> None:
    assert have(server.remote("a.bin", breaks=[300_000, 200_000], ranges=False), tmp_path) == BODY
    assert "2 times in a row" in refusal(
        server.remote("b.bin", breaks=[300_000] * 9, ranges=False), folder=tmp_path, attempts=2
    )


@pytest.mark.parametrize("etag", [None, 'W/"1"'], ids=["no ETag", "weak ETag"])
def test_without_a_sign_of_the_version_nothing_is_resumed(
    etag: str | None, server: Server, tmp_path: Path
) -> None:
    assert have(server.remote("a.bin", breaks=[300_000], etag=etag), tmp_path) == BODY
    assert server.gets("a.bin") == [None, None]


def leave_part(server: Server, folder: Path, name: str = "a.bin") -> None:
    refusal(server.remote(name, breaks=[300_000, 0, 0]), folder=folder, attempts=2)
    assert (folder / f"{name}.part").stat().st_size == 300_000


def test_the_next_call_goes_on_where_the_last_one_ended(server: Server, tmp_path: Path) -> None:
    leave_part(server, tmp_path)
    assert have(server.remote("a.bin"), tmp_path) == BODY
    assert server.gets("a.bin") == ["bytes=300000-"]


@pytest.mark.parametrize("other", [{"etag": '"2"'}, {"etag": None}])
def test_a_part_of_another_version_is_thrown_away(
    other: dict[str, Any], server: Server, tmp_path: Path
) -> None:
    leave_part(server, tmp_path)
    body = BODY[::-1]
    assert have(server.remote("a.bin", body, **other), tmp_path) == body


def test_a_part_of_a_file_that_changed_its_size_under_the_same_sign_is_thrown_away(
    server: Server, tmp_path: Path
) -> None:
    leave_part(server, tmp_path)
    body = BODY[::-1][:900_000]
    assert have(server.remote("a.bin", body), tmp_path) == body
    assert server.gets("a.bin") == ["bytes=300000-", None]


def test_a_part_of_unknown_origin_is_thrown_away(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.bin.part").write_bytes(b"?" * 300_000)
    assert have(server.remote("a.bin"), tmp_path) == BODY
    assert server.gets("a.bin") == [None]


def test_a_complete_part_is_not_asked_for_again(server: Server, tmp_path: Path) -> None:
    leave_part(server, tmp_path)
    (tmp_path / "a.bin.part").write_bytes(BODY)
    assert have(server.remote("a.bin"), tmp_path) == BODY
    assert server.gets("a.bin") == []


def test_a_busy_server_is_asked_again(server: Server, tmp_path: Path) -> None:
    assert have(server.remote("a.bin", codes=[503, 429, 500]), tmp_path) == BODY


@pytest.mark.parametrize("code", [403, 404, 410])
def test_a_refusal_is_told_at_once(code: int, server: Server, tmp_path: Path) -> None:
    remote = server.remote("a.bin", codes=[code] * 9)
    assert f"{remote.url}: the server answers {code}" in refusal(remote, folder=tmp_path)
    assert len(server.gets("a.bin")) == 1


def test_a_redirection_is_followed_but_not_out_of_http(server: Server, tmp_path: Path) -> None:
    server.remote("b.bin")
    assert have(server.remote("a.bin", codes=[302], location="/b.bin"), tmp_path) == BODY
    secret = tmp_path / "secret"
    secret.write_text("x")
    for place in (secret.as_uri(), "ftp://127.0.0.1:9/x"):
        remote = server.remote("c.bin", codes=[302] * 9, location=place)
        refusal(remote, folder=tmp_path / "new", attempts=1)
    assert list((tmp_path / "new").iterdir()) == []
    assert "must begin with http" in refusal(Remote(secret.as_uri(), "s"), folder=tmp_path)


def test_no_connection_is_told(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        remote = Remote(f"http://127.0.0.1:{taken.getsockname()[1]}/a", "a", size=1)
        assert "no connection" in refusal(remote, folder=tmp_path, attempts=2)


@pytest.mark.parametrize("checksum", ["sha256", "md5"])
def test_a_wrong_checksum_is_told_and_the_file_removed(checksum: str, server: Server, tmp_path: Path) -> None:
    server.remote("a.bin")
    remote = Remote(f"{server.url}/a.bin", "a.bin", **{checksum: "0123"})  # type: ignore[arg-type]
    digest = hashlib.new(checksum, BODY).hexdigest()
    assert f"its {checksum} is {digest} instead of 0123" in refusal(remote, folder=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_of_another_size_is_refused_before_it_is_downloaded(server: Server, tmp_path: Path) -> None:
    server.remote("a.bin")
    said = refusal(Remote(f"{server.url}/a.bin", "a.bin", size=7), folder=tmp_path)
    assert "has 1,024,000 bytes now and 7 were expected" in said
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_but_wrong_is_kept_and_told(server: Server, tmp_path: Path) -> None:
    remote = server.remote("a.bin")
    (tmp_path / "a.bin").write_bytes(BODY[:-1])
    assert "is there, but it has 1,023,999 bytes instead of 1,024,000; delete or rename it" in refusal(
        remote, folder=tmp_path
    )
    (tmp_path / "a.bin").write_bytes(BODY[::-1])
    assert "is there, but its sha256 is" in refusal(remote, folder=tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == BODY[::-1]
    assert server.gets("a.bin") == []


def test_one_failure_ends_the_other_downloads_in_a_state_to_go_on_from(
    server: Server, tmp_path: Path
) -> None:
    good = server.remote("good.bin", breaks=[300_000] + [0] * 99)
    assert "404" in refusal(good, Remote(f"{server.url}/none", "none"), folder=tmp_path, attempts=99)
    server.files["/good.bin"].breaks.clear()
    assert have(good, tmp_path) == BODY


def test_a_full_disk_is_told_before_the_download(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known, unknown = server.remote("a.bin"), server.remote("b.bin", BODY + b"1")
    known = Remote(known.url, "a.bin", size=known.size, unpacked=1_000_000)
    unknown = Remote(unknown.url, "b.bin")
    full_disk(monkeypatch, 3_040_000)
    said = refusal(known, unknown, folder=tmp_path / "new" / "folder")
    assert f"{tmp_path}/new/folder: 3.0 MB are needed (2.0 MB of downloads, about 1.0 MB unpacked)" in said
    assert "3.0 MB are free" in said
    assert server.gets("a.bin") == server.gets("b.bin") == []
    assert list(tmp_path.iterdir()) == []
    full_disk(monkeypatch, 3_048_001)
    fetch([known, unknown], tmp_path)


def archive_of(folder: Path, members: Mapping[str, bytes | str]) -> Path:
    (folder / "a.zip").write_bytes(zipped(members))
    return folder / "a.zip"


def test_a_zip_is_unpacked_once_and_completed_after_a_break(tmp_path: Path) -> None:
    archive = archive_of(tmp_path, {"a/": "", "a/1.jpg": "one", "a/2.jpg": "two", "b/3.jpg": "no"})
    out = tmp_path / "out"
    for _ in range(2):
        assert unpack(archive, out, lambda name: name if name.startswith("a/") else None) == 2
        assert {path.name: path.read_text() for path in out.rglob("*.jpg")} == {
            "1.jpg": "one",
            "2.jpg": "two",
        }
        (out / "a" / "2.jpg").write_text("t")  # as if written in part
        first = (out / "a" / "1.jpg").stat().st_mtime_ns
    assert (out / "a" / "1.jpg").stat().st_mtime_ns == first


@pytest.mark.parametrize("name", ["../evil", "a/../../evil", "/tmp/evil", "a\\..\\evil", "C:evil"])
def test_a_zip_that_leaves_its_folder_is_refused_whole(name: str, tmp_path: Path) -> None:
    archive = archive_of(tmp_path, {"good.jpg": "x", name: "x"})
    with pytest.raises(InputError, match="path out of its folder"):
        unpack(archive, tmp_path / "out", lambda name: name)
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_a_zip_with_a_link_is_refused(tmp_path: Path) -> None:
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="'link', a link"):
        unpack(tmp_path / "a.zip", tmp_path / "out", lambda name: name)


def test_a_damaged_zip_and_a_full_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = archive_of(tmp_path, {"a.jpg": BODY})
    full_disk(monkeypatch, 1_000_000)
    with pytest.raises(InputError, match=r"1.0 MB are needed \(1.0 MB from a.zip\)"):
        unpack(archive, tmp_path / "out", lambda name: name)
    full_disk(monkeypatch, 10**9)
    content = bytearray(archive.read_bytes())
    content[500_000] ^= 1
    for damaged in (content, content[:1000]):
        archive.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged or no zip"):
            unpack(archive, tmp_path / "out", lambda name: name)
    assert not any((tmp_path / "out").rglob("*.*"))
