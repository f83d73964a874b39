"""Bugs in what carries frames between nodes, and in how a connection begins. Plain data: imports nothing of the
program.
"""

from __future__ import annotations

from tests.sim.planted import Planted

_PACKETS = "storaged/cluster/rpc/packets.py"
_HANDSHAKE = "storaged/cluster/rpc/handshake.py"
_CONNECTION = "storaged/cluster/rpc/connection.py"
_SERVER = "storaged/cluster/rpc/server.py"
_PURE = "tests/property/test_packets.py"
_SERVED = "tests/integration/test_rpc_packets.py"
_HOSTILE = "tests/integration/test_rpc_hostile_peers.py"

PACKET_BUGS = (
    Planted(
        "tag_not_checked",
        "a packet whose tag is wrong is taken",
        1,
        path=_PACKETS,
        old='raise PacketError("a packet is not what the peer has sealed, or not the next one") from None',
        new="pass",
        tests=f"{_PURE}::test_a_flipped_bit_ends_the_stream_before_the_packet_that_has_it",
    ),
    Planted(
        "one_secret_for_both_directions",
        "both sides send under the same keys: a packet can be sent back, and nonces are used twice",
        1,
        path=_PACKETS,
        old='_derive(dialler + listener, b"listener")',
        new='_derive(dialler + listener, b"dialler")',
        tests=f"{_PURE}::test_a_packet_that_is_sent_back_to_its_sender_does_not_open",
    ),
    Planted(
        "secret_of_one_side",
        "the keys come from what the side that dials has sent alone",
        1,
        path=_PACKETS,
        old='Secrets(_derive(dialler + listener, b"dialler"))',
        new='Secrets(_derive(dialler + dialler, b"dialler"))',
        tests=f"{_PURE}::test_a_packet_of_another_connection_does_not_open",
    ),
    Planted(
        "same_key_again",
        "the next key is the last one, and its numbers begin again",
        1,
        path=_PACKETS,
        old='self._secret = _expand(self._secret, b"next", 32)',
        new="pass",
        tests=f"{_PURE}::test_no_key_seals_twice_under_one_nonce_nor_more_than_its_share",
    ),
    Planted(
        "any_length",
        "a stranger's length is believed up to 4 GiB",
        1,
        path=_PACKETS,
        old="if not _LENGTH_MIN <= inner <= _LENGTH_MAX:",
        new="if inner < _LENGTH_MIN:",
        tests=f"{_PURE}::test_a_length_out_of_its_bounds_ends_the_stream_as_soon_as_it_is_read",
    ),
    Planted(
        "opened_while_frames_wait",
        "packets are opened although the frames have no room",
        1,
        path=_PACKETS,
        old="while not frames.waiting and (begin := start + LENGTH_BYTES) <= end:",
        new="while (begin := start + LENGTH_BYTES) <= end:",
        tests=_PURE,
    ),
    Planted(
        "rest_of_a_packet_lost",
        "what frames have no room for is forgotten when it is behind the end of a body",
        1,
        path=_PACKETS,
        old="                self._rest = rest\n                return\n",
        new="                return\n",
        tests=_PURE,
    ),
    Planted(
        "goes_on_after_an_error",
        "the packets behind one that did not open are opened",
        1,
        path=_PACKETS,
        old="            self._frames = _ENDED\n",
        new="            pass\n",
        tests=_PURE,
    ),
    Planted(
        "kept_memory_written_over",
        "what a transport still holds is sealed over",
        1,
        path=_PACKETS,
        old="    _shared.out = None\n",
        new="    pass\n",
        tests=_SERVED,
    ),
    Planted(
        "secret_of_any_size",
        "what a peer sends in TLS is taken for its secret, whatever it is",
        1,
        path=_HANDSHAKE,
        old="if len(secret) != SECRET_BYTES:",
        new="secret = secret.ljust(SECRET_BYTES, b'0')[:SECRET_BYTES]\n        if not secret:",
        tests=_SERVED,
    ),
    Planted(
        "handshake_of_any_size",
        "a stranger's handshake has no largest size",
        1,
        path=_HANDSHAKE,
        old="if self._taken > HANDSHAKE_WIRE_BYTES_MAX:",
        new="if not self._taken:",
        tests=f"{_SERVED}::test_a_handshake_of_tls_has_a_largest_size",
    ),
    Planted(
        "no_tls_and_waited_for",
        "what is no record of TLS waits for the time of a handshake",
        1,
        path=_HANDSHAKE,
        old='            raise PacketError("what arrived is no record of TLS")\n',
        new="            return 0\n",
        tests=f"{_SERVED}::test_what_is_no_record_of_tls_is_refused_at_its_first_bytes",
    ),
    Planted(
        "packets_behind_the_secret_lost",
        "what arrives in one read with the peer's secret is dropped",
        1,
        path=_HANDSHAKE,
        old="        _pass_on(rest, secured.reader)\n",
        new="",
        tests=_SERVED,
    ),
    Planted(
        "an_old_peers_end_not_seen",
        "a peer of version 0.1.0 that closes in TLS waits for the other side's end",
        1,
        path=_HANDSHAKE,
        old="                    self._ended()\n",
        new="",
        tests=f"{_SERVED}::test_a_node_of_0_1_0_dials_and_its_calls_come_through_tls",
    ),
    Planted(
        "half_a_packet_is_no_silence",
        "a peer that stops in the middle of a packet is kept for ever",
        1,
        path=_CONNECTION,
        old=" or (self._incoming is not None and self._incoming.mid_packet)",
        new="",
        tests=f"{_SERVED}::test_a_peer_that_stops_in_the_middle_of_a_packet_is_ended",
    ),
    Planted(
        "one_node_takes_all_connections",
        "one certified node may have as many connections as there are",
        1,
        path=_SERVER,
        old="        if names.count(peer.name) >= most:\n",
        new="        if not names and not most:\n",
        tests=f"{_HOSTILE}::test_one_node_does_not_take_all_connections_and_reads_why",
    ),
)
