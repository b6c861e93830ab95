"""What the warp-specialised kernels share on the device: barriers, the ring's next place, a block that leaves. In Gluon (see hopper.py)."""

from __future__ import annotations

from fastlora.kernels.hopper import MISSING, copy_out, fence_async_shared, gl, gluon, mbarrier, tma

if MISSING is None:

    @gluon.jit
    def ring(count: gl.constexpr, arrivals: gl.constexpr):
        """``count`` barriers, each complete after so many arrivals."""
        bars = gl.allocate_shared_memory(gl.int64, [count, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(count):
            mbarrier.init(bars.index(i), count=arrivals)
        return bars

    @gluon.jit
    def claim(full, empty, turn, BYTES: gl.constexpr, STAGES: gl.constexpr):
        """(number, barrier) of the ring's next place, once it is free: BYTES are then expected there."""
        stage = turn % STAGES
        mbarrier.wait(empty.index(stage), ((turn // STAGES) & 1) ^ 1)
        bar = full.index(stage)
        mbarrier.expect(bar, BYTES)
        return stage, bar

    @gluon.jit
    def leave(b_out, d_out, s_out, row, column, PENDING: gl.constexpr):
        """Round a warpgroup's block and start its copy to (row, column), once all but the last PENDING stores have read their places, that
        of s_out among them."""
        tma.store_wait(PENDING)
        s_out.store(b_out.to(d_out.dtype))
        fence_async_shared()
        copy_out(d_out, [row, column], s_out)
