"""Messages from strangers, damaged messages, and hostile ones from members."""

import random
import socket
import struct
import threading

import pytest
import torch

from ltrain.config.base import ConfigError
from ltrain.config.sync import SparseLoCo
from ltrain.sync.coordinator import WaitPolicy
from ltrain.sync.dataplane import DataPlane, Remote
from ltrain.sync.frame import write_frame
from ltrain.sync.methods import run_identity
from ltrain.sync.outer import OuterState
from ltrain.sync.rendezvous import Rendezvous
from ltrain.sync.wire import WireError, accept, connect, listen, load_token

TOKEN = b"0123456789abcdef0123"


def _pair(token_a=TOKEN, token_b=TOKEN, max_body=1 << 20):
    server, found = listen("127.0.0.1", 0), []

    def take():
        try:
            found.append(accept(server.accept()[0], token_b, max_body=max_body, timeout_s=2.0))
        except WireError as error:
            found.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    try:
        return connect(server.getsockname()[:2], token_a, max_body=max_body, timeout_s=2.0), thread, found
    finally:
        server.close()


def test_messages_arrive_as_sent():
    a, thread, found = _pair()
    thread.join()
    b = found[0]
    body = bytes(range(256)) * 1000
    a.send("one", {"x": [1, "é"]}, body)
    a.send("two")
    message = b.receive()
    assert (message.kind, message.fields, message.body) == ("one", {"x": [1, "é"]}, body)
    assert b.receive().kind == "two" and b.bytes_received == a.bytes_sent
    b.send("back")
    assert a.receive().kind == "back"
    b.close()
    with pytest.raises(WireError):
        a.receive()


def test_another_token_is_refused_on_both_sides():
    with pytest.raises(WireError):
        _pair(token_b=b"another secret of the run")


def test_a_stranger_gets_nothing():
    server = listen("127.0.0.1", 0)
    stranger = socket.create_connection(server.getsockname()[:2])
    stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
    with pytest.raises(WireError):
        accept(server.accept()[0], TOKEN, timeout_s=2.0)
    stranger.settimeout(2.0)
    answer = stranger.recv(1000)
    assert len(answer) <= 20
    server.close()


@pytest.mark.parametrize("attack", ["flip", "replay", "reorder", "oversized", "cut"])
def test_altered_traffic_is_refused(attack):
    a, thread, found = _pair(max_body=1000)
    thread.join()
    b = found[0]
    sent = []
    real = a._sock

    class Recorder:
        def sendall(self, data):
            sent.append(bytes(data))

        def __getattr__(self, name):
            return getattr(real, name)

    a._sock = Recorder()
    a.send("one", {}, b"x" * 100)
    first = b"".join(sent)
    a.send("two", {}, b"y" * 100)
    second = b"".join(sent)[len(first) :]
    if attack == "flip":
        data = bytearray(first)
        data[-50] ^= 4
        real.sendall(bytes(data))
    elif attack == "replay":
        real.sendall(first + first)
        assert b.receive().kind == "one"
    elif attack == "reorder":
        real.sendall(second + first)
    elif attack == "oversized":
        real.sendall(struct.pack("<4sIQ16s", b"LTW1", 10, 10 << 30, bytes(16)))
    else:
        real.sendall(first[:-1])
        real.shutdown(socket.SHUT_WR)
    with pytest.raises(WireError):
        b.receive()


def test_token_files(tmp_path):
    path = tmp_path / "token"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_token(str(path))
    path.write_bytes(TOKEN)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="owner"):
        load_token(str(path))
    path.chmod(0o600)
    assert load_token(str(path)) == TOKEN
    path.write_bytes(b"short")
    with pytest.raises(ConfigError, match="16 bytes"):
        load_token(str(path))


def test_the_service_survives_malformed_members():
    service = Rendezvous(("127.0.0.1", 0), TOKEN, 2, WaitPolicy(0.1, 1.0, 4.0))
    generator = random.Random(0)
    good = {"replica": "a", "rank": 0, "num_ranks": 1, "host": "h", "port": 1, "shards": {"s": "x"},
            "fields": {"model": "m"}, "round": 0, "digests": {}}  # fmt: skip
    values = [None, -1, 1 << 60, "", [], {}, {"a": 1}, True, 1.5, "x" * 10_000]
    for _ in range(150):
        channel = connect(service.address, TOKEN)
        channel.settimeout(5.0)
        hello = dict(good)
        if generator.random() < 0.5:
            hello[generator.choice(list(good))] = generator.choice(values)
        try:
            channel.send(generator.choice(["hello", "hello", "arrived", "x"]), hello)
            for _ in range(3):
                fields = {"round": generator.choice(values), "replica": "zz", "shard": "s", "sha": "q",
                          "reason": "r", "frames": generator.choice([{}, [], {"s": "1"}, {"q": "1"}]),
                          "digests": {}, "notes": {}}  # fmt: skip
                channel.send(generator.choice(["arrived", "have", "bad", "synced", "resync", "y"]), fields)
        except WireError:
            pass
        channel.close()
    channel = connect(service.address, TOKEN)
    channel.settimeout(5.0)
    channel.send("hello", good | {"replica": "late"})
    assert channel.receive().kind in ("peers", "refuse")
    channel.close()
    service.close()


def test_frames_of_members_are_checked_before_they_count():
    config = SparseLoCo(density=0.1)
    tensors = {"w": torch.randn(500)}
    identity = run_identity(config, tensors)
    bodies, bad = [], []
    plane = DataPlane(
        "b", identity, TOKEN, ("127.0.0.1", 0), lambda *a: bodies.append(a), lambda *a: bad.append(a), 5.0
    )
    frame = write_frame(identity, "all", 0, OuterState(config, {"w": tensors["w"].clone()}).contribute())
    generator = random.Random(0)
    channel = connect(plane.address, TOKEN)
    for i in range(200):
        damaged = bytearray(frame)
        damaged[generator.randrange(len(frame))] ^= 1 << generator.randrange(8)
        data = bytes(damaged) if i % 3 else frame[: generator.randrange(len(frame))]
        channel.send("body", {"round": 0, "replica": f"r{i}", "shard": "all"}, data)
    # A frame of another round, too far ahead, and one that is sent twice.
    channel.send("body", {"round": 9, "replica": "a", "shard": "all"}, frame)
    channel.send("body", {"round": 1, "replica": "a", "shard": "all"}, frame)
    channel.send("body", {"round": 0, "replica": "a", "shard": "all"}, frame)
    channel.send("body", {"round": 0, "replica": "a", "shard": "all"}, frame)
    channel.close()
    remote = Remote("b", 0, plane.address, frozenset({"all"}))
    answer = plane.request(remote, "fetch", {"round": 0, "replica": "a", "shard": "all"}, 5.0)
    for _ in range(100):
        if answer.kind == "body":
            break
        answer = plane.request(remote, "fetch", {"round": 0, "replica": "a", "shard": "all"}, 5.0)
    assert answer.body == frame
    assert [b[:2] for b in bodies] == [(0, "a")] and len(bad) == 201
    # Members that break the protocol lose their connection, not more.
    for fields in ({"round": 0, "replica": "b", "shard": "all"}, {"round": 0, "replica": "a", "shard": "?"},
                   {"round": "0", "replica": "a", "shard": "all"}, {}):  # fmt: skip
        channel = connect(plane.address, TOKEN)
        channel.settimeout(5.0)
        channel.send("body", fields, frame)
        with pytest.raises(WireError):
            channel.receive()
    assert plane.request(remote, "snapshot", {"shard": "all"}, 5.0).kind == "gone"
    plane.close()
