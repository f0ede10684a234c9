# SPDX-License-Identifier: LGPL-2.1-or-later
"""The engine's pure parts: what is read from and written to bytes, and which mode is chosen."""

from __future__ import annotations

import struct
from typing import ClassVar

import pytest

from remus_colo.checkpoint import birth, hvmcontext, libxlformat, sharedinfo
from remus_colo.checkpoint.guestinfo import Mode, refuse_config, refuse_device_model, refuse_for_remus
from remus_colo.checkpoint.mode import MAX_AHEAD_NS, MAX_BEHIND_NS, choose
from remus_colo.errors import DomainError, MessageError


class TestMode:
    def test_near_clocks_are_transparent(self) -> None:
        for offset_ns in (-MAX_BEHIND_NS, 0, MAX_AHEAD_NS):
            assert choose("auto", offset_ns=offset_ns, two_level_events=True).mode is Mode.TRANSPARENT

    @pytest.mark.parametrize("offset_ns", [-MAX_BEHIND_NS - 1, MAX_AHEAD_NS + 1, -600 * 10**9, 600 * 10**9])
    def test_far_clocks_are_cooperative_and_say_so(self, offset_ns: int) -> None:
        choice = choose("auto", offset_ns=offset_ns, two_level_events=True)
        assert choice.mode is Mode.COOPERATIVE
        assert "Xen clock" in choice.why

    @pytest.mark.parametrize("offset_ns", [-600 * 10**9, -MAX_BEHIND_NS - 1, 0, 600 * 10**9])
    def test_a_backup_that_can_set_the_clock_suits_any_guest(self, offset_ns: int) -> None:
        for requested in ("auto", "transparent"):
            choice = choose(requested, offset_ns=offset_ns, two_level_events=True, settable_clock=True)
            assert choice.mode is Mode.TRANSPARENT
            assert f"{offset_ns / 1e9:+.3f} s" in choice.why
        assert (
            choose("cooperative", offset_ns=0, two_level_events=True, settable_clock=True).mode
            is Mode.COOPERATIVE
        )

    def test_a_settable_clock_does_not_help_fifo_events(self) -> None:
        assert (
            choose("auto", offset_ns=0, two_level_events=False, settable_clock=True).mode is Mode.COOPERATIVE
        )

    def test_fifo_events_are_cooperative_or_refused_with_the_remedy(self) -> None:
        assert choose("auto", offset_ns=0, two_level_events=False).mode is Mode.COOPERATIVE
        with pytest.raises(DomainError, match=r"xen\.fifo_events=0"):
            choose("transparent", offset_ns=0, two_level_events=False)

    def test_transparent_is_refused_where_the_clock_would_jump(self) -> None:
        for offset_ns, effect in ((10**9, "would jump"), (-(10**9), "would stand still")):
            with pytest.raises(DomainError, match=rf"{effect}.*system time offset.*--checkpoint cooperative"):
                choose("transparent", offset_ns=offset_ns, two_level_events=True)

    @pytest.mark.parametrize("offset_ns", [-(10**9), 10**9])
    def test_what_is_advised_against_clocks_apart_is_what_is_looked_at(self, offset_ns: int) -> None:
        """The guest's clock source is not, and hosts that are booted again are as far apart the other way round."""
        with pytest.raises(DomainError) as refused:
            choose("transparent", offset_ns=offset_ns, two_level_events=True)
        assert "system time offset" in str(refused.value)
        assert "clocksource" not in str(refused.value)
        assert "before the primary" not in str(refused.value)

    def test_cooperative_when_asked_for(self) -> None:
        assert choose("cooperative", offset_ns=0, two_level_events=True).mode is Mode.COOPERATIVE


class TestSharedInfo:
    def test_pending_bit_is_where_xen_has_it(self) -> None:
        page = memoryview(bytearray(4096))
        sharedinfo.set_pending(page, 67)
        words = struct.unpack_from("<64Q", page, 2048)
        assert words[1] == 1 << 3 and sum(words) == words[1]
        assert sharedinfo.is_pending(page, 67) and not sharedinfo.is_pending(page, 66)

    @pytest.mark.parametrize("port", [-1, 4096])
    def test_ports_beyond_the_abi_are_refused(self, port: int) -> None:
        with pytest.raises(ValueError, match="does not exist"):
            sharedinfo.set_pending(memoryview(bytearray(4096)), port)

    def test_masks_tell_a_two_level_guest(self) -> None:
        page = bytearray(4096)
        assert not sharedinfo.masks_unbound_ports(memoryview(page))
        page[2560:3072] = b"\xff" * 512
        assert sharedinfo.masks_unbound_ports(memoryview(page))

    def test_rings(self) -> None:
        page = bytearray(4096)
        assert sharedinfo.ring_idle(memoryview(page)) and sharedinfo.store_ring_idle(memoryview(page))
        struct.pack_into("<I", page, 0, 5)  # five requests, no response
        assert not sharedinfo.ring_idle(memoryview(page))
        struct.pack_into("<I", page, 8, 5)
        assert sharedinfo.ring_idle(memoryview(page))
        struct.pack_into("<IIII", page, 2048, 7, 8, 3, 3)  # a request that xenstored has not read
        assert not sharedinfo.store_ring_idle(memoryview(page))

    def test_grant_frame(self) -> None:
        table = struct.pack("<HHI", 0, 0, 0) + struct.pack("<HHI", 1 | 16, 0, 0x1234)
        assert sharedinfo.grant_frame(table, 0) is None
        assert sharedinfo.grant_frame(table, 1) == 0x1234
        assert sharedinfo.grant_frame(table, 2) is None


def _context(vectors: bytes) -> bytes:
    lapic = bytearray(1024)
    for vector in vectors:
        lapic[0x200 + vector // 32 * 16 + vector % 32 // 8] |= 1 << vector % 8
    return (
        struct.pack("<HHI", 1, 0, 4)
        + b"head"
        + struct.pack("<HHI", hvmcontext.TYPE_LAPIC_REGS, 0, 1024)
        + bytes(lapic)
        + struct.pack("<HHI", hvmcontext.TYPE_END, 0, 0)
    )


class TestHvmContext:
    def test_only_the_named_request_goes(self) -> None:
        assert hvmcontext.without_request(_context(bytes([0xF3, 0xEC])), 0xF3) == _context(bytes([0xEC]))
        assert hvmcontext.without_request(_context(b""), 0xF3) == _context(b"")

    def test_a_cut_context_is_refused(self) -> None:
        whole = _context(b"")
        for size in (len(whole) - 9, 30, 3):
            with pytest.raises(MessageError, match="ends within a record"):
                hvmcontext.without_request(whole[:size], 0xF3)

    def test_no_vector(self) -> None:
        with pytest.raises(ValueError, match="no interrupt vector"):
            hvmcontext.without_request(_context(b""), 7)


class TestBirth:
    CONFIG: ClassVar = {
        "c_info": {"name": "web", "uuid": "u-1", "type": "pvh"},
        "nics": [{"mac": "00:16:3e:77:00:10", "bridge": "xenbr0", "ifname": "vif-web"}],
    }

    def test_the_secondary_is_isolated_and_has_its_own_name(self) -> None:
        secondary = birth.secondary_config(self.CONFIG, lambda index: f"isolated{index}", same_host=False)
        assert secondary["c_info"] == {"name": "web--secondary", "uuid": "u-1", "type": "pvh"}
        assert secondary["nics"] == [{"mac": "00:16:3e:77:00:10", "bridge": "isolated0"}]
        assert self.CONFIG["nics"][0]["bridge"] == "xenbr0"  # type: ignore[index]

    def test_on_one_host_the_uuid_differs(self) -> None:
        secondary = birth.secondary_config(self.CONFIG, lambda index: "b", same_host=True)
        assert secondary["c_info"]["uuid"] != "u-1"

    def test_prologue_is_what_xl_restore_reads(self) -> None:
        prologue = libxlformat.prologue({"a": 1})
        magic, order, mandatory, optional_flags, size = libxlformat.SAVE_HEADER.unpack_from(prologue)
        assert (magic, order, mandatory, optional_flags) == (libxlformat.SAVE_MAGIC, 0x01020304, 3, 0)
        (length,) = struct.unpack_from("<I", prologue, 48)
        assert length == size - 4 and prologue[52 : 52 + length] == b'{"a": 1}\0'
        ident, version, options = libxlformat.STREAM_HEADER.unpack_from(prologue, 48 + size)
        assert (ident.to_bytes(8, "big"), version, options) == (b"LibxlFmt", 2, 0)


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "words"),
        [
            ({"b_info": {"type": "pv"}}, "PV guest"),
            ({"b_info": {"type": "hvm"}}, "HVM guest"),
            ({"b_info": {"type": "pvh"}, "disks": [{"vdev": "xvda", "readwrite": 1}]}, "writable disk .xvda"),
        ],
    )
    def test_what_cannot_work_is_refused_with_words(self, config: dict[str, object], words: str) -> None:
        with pytest.raises(DomainError, match=words):
            refuse_config("web", config)

    @pytest.mark.parametrize(
        ("config", "words"),
        [
            (
                {"b_info": {"type": "hvm", "device_model_stubdomain": "True"}},
                "device_model_stubdomain_override=0",
            ),
            (
                {"b_info": {"type": "hvm", "device_model_version": "qemu_xen_traditional"}},
                "qemu-xen-traditional",
            ),
            ({"b_info": {"type": "hvm", "type.hvm": {"nested_hvm": "True"}}}, "nestedhvm=0"),
            ({"b_info": {"type": "hvm"}, "pcidevs": [{"dev": 1}]}, "xl pci-detach"),
            ({"b_info": {"type": "pv"}, "usbdevs": [{"ctrl": 1}]}, "xl usbdev-detach"),
        ],
    )
    def test_what_remus_cannot_copy_is_refused_with_words(
        self, config: dict[str, object], words: str
    ) -> None:
        with pytest.raises(DomainError, match=words):
            refuse_for_remus("web", config)

    def test_hvm_guests_are_welcome_without_colo(self) -> None:
        stubdomain: dict[str, object] = {
            "device_model_stubdomain": "<default>",
            "type.hvm": {"nested_hvm": "False"},
        }
        refuse_for_remus("web", {"b_info": {"type": "hvm"} | stubdomain})

    def test_but_not_where_only_libxenguests_stream_goes(self) -> None:
        refuse_device_model("web", {"b_info": {"type": "pvh"}})
        with pytest.raises(DomainError, match="protect it by the command remus"):
            refuse_device_model("web", {"b_info": {"type": "hvm"}})

    def test_a_pvh_guest_without_disks_is_welcome(self) -> None:
        refuse_config("web", {"b_info": {"type": "pvh"}, "disks": [{"vdev": "xvdb", "readwrite": 0}]})
