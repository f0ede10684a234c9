# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fields of guest-visible pages that the engine looks at. Pure.

Sources: ``struct shared_info`` of public/xen.h (64-bit), ``struct xenstore_domain_interface`` of
public/io/xs_wire.h, ``union netif_tx_sring`` of public/io/ring.h, ``grant_entry_v1`` of
public/grant_table.h.
"""

from __future__ import annotations

import struct

PENDING_OFFSET = 2048  # evtchn_pending: 64 words after 32 vcpu_info of 64 bytes
MASK_OFFSET = PENDING_OFFSET + 512  # evtchn_mask
PORTS_2L = 4096

_U32 = struct.Struct("<I")
_STORE_INDICES = struct.Struct("<IIII")  # req_cons, req_prod, rsp_cons, rsp_prod
STORE_INDICES_OFFSET = 2048  # after two rings of 1024 bytes
_GRANT_V1 = struct.Struct("<HHI")  # flags, domid, frame
GRANT_V1_SIZE = 8
GTF_TYPE_MASK = 3
GTF_PERMIT_ACCESS = 1


def set_pending(shared_info: memoryview, port: int) -> None:
    """Make an event channel of the 2-level ABI pending."""
    _check_port(port)
    shared_info[PENDING_OFFSET + port // 8] |= 1 << port % 8


def is_pending(shared_info: memoryview, port: int) -> bool:
    _check_port(port)
    return bool(shared_info[PENDING_OFFSET + port // 8] >> port % 8 & 1)


def masks_unbound_ports(shared_info: memoryview) -> bool:
    """Whether ports that cannot be in use are masked: Linux does so at boot with the 2-level ABI, and only then."""
    return any(shared_info[MASK_OFFSET + 256 : MASK_OFFSET + 512])


def _check_port(port: int) -> None:
    if not 0 <= port < PORTS_2L:
        raise ValueError(f"port {port} does not exist in the 2-level event channel ABI")


def store_ring_idle(page: memoryview) -> bool:
    """Whether no request and no reply is under way on a xenstore ring."""
    req_cons, req_prod, rsp_cons, rsp_prod = _STORE_INDICES.unpack_from(page, STORE_INDICES_OFFSET)
    return bool(req_cons == req_prod and rsp_cons == rsp_prod)


def ring_idle(page: memoryview) -> bool:
    """Whether each request on a shared ring (``req_prod`` at 0, ``rsp_prod`` at 8) has its response."""
    return bool(_U32.unpack_from(page, 0) == _U32.unpack_from(page, 8))


def grant_frame(grants: bytes, ref: int) -> int | None:
    """The gfn that a v1 grant reference gives access to, None if it gives none."""
    if (ref + 1) * GRANT_V1_SIZE > len(grants):
        return None
    flags, _domid, frame = _GRANT_V1.unpack_from(grants, ref * GRANT_V1_SIZE)
    return int(frame) if flags & GTF_TYPE_MASK == GTF_PERMIT_ACCESS else None
