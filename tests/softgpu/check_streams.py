# SPDX-License-Identifier: Apache-2.0
"""Whether a weight gradient is ordered after the work it reads when layers run on side streams:
happens-before, from the events in the log of the runtime.

    python .../run.py python .../check_streams.py [deferred|accumulate|autograd]
"""

import sys

import torch

import softgpu
from unipool.nn import ExpertPool, NormRouter, pooled_moe

MODE = sys.argv[1] if len(sys.argv) > 1 else "deferred"
WINDOW = 0 if MODE == "accumulate" else 2**26


def backward_of_two_layers() -> list[dict[str, str]]:
    torch.manual_seed(0)
    pool = ExpertPool(4, 64, 32, weight_grad=MODE, wgrad_window_bytes=WINDOW).cuda()
    layers = [NormRouter(64, 4, 2).cuda() for _ in range(2)]
    x = torch.randn(64, 64, device="cuda", requires_grad=True)
    main, results = torch.cuda.current_stream(), []
    scope = pool.begin_pass()
    for layer in layers:
        side = torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            results.append(pooled_moe(x, layer, scope)[0])
        main.wait_stream(side)
    loss = sum(results).sum()
    with softgpu.calls() as calls:
        loss.backward()
    return calls


clocks: dict[str, dict[str, int]] = {}  # of a stream: the launches of each that come before
events: dict[str, dict[str, int]] = {}
written: dict[str, int] = {}  # a stream's last launch of a layer's backward
for call in backward_of_two_layers():
    stream = call.get("stream", "")
    clock = clocks.setdefault(stream, {})
    if call["call"] == "event_record":
        events[call["event"]] = dict(clock)
    elif call["call"] == "stream_wait_event":
        for other, launches in events.get(call["event"], {}).items():
            clock[other] = max(clock.get(other, 0), launches)
    elif call["call"] == "launch":
        clock[stream] = clock.get(stream, 0) + 1
        if "expert_hidden_bwd_kernel" in call["kernel"]:
            written[stream] = clock[stream]
        if "wgrad_kernel" in call["kernel"]:
            racing = [s for s, launch in written.items() if clock.get(s, 0) < launch]
            print(f"{MODE}: wgrad on stream {stream}, not ordered after the layers on {racing}")
