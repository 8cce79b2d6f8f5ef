"""The round of `decode` with static shapes, so that a whole round can be one CUDA graph.

Draft, tree, verification and commit are those of `decode`; what differs is where the state is. Lengths, tokens that
wait and features are on the device, and the host reads what was accepted while the next round runs. A sequence whose
cache holds `held` rows knows held + 1 tokens. The drafter is yet to be shown the last `valid` of them (`following`,
with the features that gave them), the newest of which is the root of the round. B sequences advance each at its own
pace.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import DynamicCache

from psnb import cache as caches
from psnb import joined
from psnb.cache import KVCache, StaticCache
from psnb.decode import Generation, Round, Sampler, Settings, Stops, _forward, check
from psnb.drafters import Drafter
from psnb.drafters.base import gather, last
from psnb.drafters.parallel import plant
from psnb.errors import UserError
from psnb.profile import nearest
from psnb.target import Target, check_attention, heads, ropes
from psnb.tree import Candidates, Plan, Shape, Tree
from psnb.verify import ACCEPT, DRAFT, EMIT, Verdict, gumbel, uniform

FIRST = 256  # rows of the smallest bucket
BLOCK = 64  # rows of a cache come in so many
WIDE = 4096  # rows of the largest bucket that kernels are made for: sums over more are cut in two
PARTS = ("draft", "verify", "walk", "commit")  # of a round
CURE = "leave notebook 7 out (`stages`); the others decode it without the engine"
# The compiler's options. Products of one row become generated reductions, tried in several sizes: faster, and longer to
# compile. The noise is a hash, whose words are each used twice: written out in full it took 2 cores 28 s, now 3. Tiling
# by memory access is not meant for symbolic sizes: torch 2.11 stops where it meets two forms of one (pytorch#181563).
# Other elementwise kernels are small: to time each in two forms takes longer than is won. Where the GPU can (Hopper), a
# kernel of a one-row pass is on its way before the one before it ends (programmatic dependent launch).
QUICK = {"triton.autotune_pointwise": False}
TUNED = {
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "triton.enable_pdl": True,
}
SHORT = {**QUICK, "realize_opcount_threshold": 8, "triton.coalesce_tiling_analysis": False}


class _Given:
    """What `decode.Sampler` asks of its noise, made beforehand: positions count from the round's first."""

    def __init__(self, dtype: torch.dtype, parts: dict[str, Tensor]) -> None:
        self.dtype, self.parts = dtype, parts

    def rows(self, start: int, count: int) -> Tensor:
        return self.parts["rows"][..., start : start + count, :]

    def drafts(self, start: int, count: int) -> Tensor:
        return self.parts["drafts"]

    def accepts(self, start: int, depth: int, width: int) -> Tensor:
        return self.parts["accepts"]

    def emit(self, start: int) -> Tensor:
        return self.parts["emit"]


def refuse(target: Target) -> None:
    """Raises `UserError` for a target that needs more than keys and values of static shapes, the same in all layers.

    Of these `decode.py` decodes some, so whoever has the choice (`measure.run`) takes that.
    """
    config = target.config
    check_attention(target.model)
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise UserError("the engine decodes decoder-only targets: this one attends to an encoder; use another")
    if moving := {of.get("rope_type") for of in ropes(config)} & {"dynamic", "longrope"}:
        raise UserError(f"{moving.pop()} RoPE looks at the length in every pass, which a graph cannot: {CURE}")
    (_, keys, width), seen, zero = heads(config), DynamicCache(), torch.zeros(1, 1, dtype=torch.long)
    with torch.inference_mode():
        target.features(*(zero.to(target.device),) * 2, None, seen)
    if {(*of.keys.shape[1::2], of.values.shape[-1]) for of in seen.layers} != {(keys, width, width)}:
        raise UserError(f"the engine needs {keys} key heads of {width} in every layer, this target has others: {CURE}")


class Prompts:
    """What a prompt leaves in the target and in a drafter, kept until another one comes: engines in turn share it.

    graph (None: on a GPU): a forward is a CUDA graph over as many rows as `_rows` says. The last of them are padding,
    which no other row sees.
    """

    def __init__(self, target: Target, graph: bool | None = None) -> None:
        self.target = target
        self.graph = target.device.type == "cuda" if graph is None else graph
        self.capture_seconds = 0.0
        self._prompt: tuple[int, ...] = ()
        self._found: dict[Any, tuple[Tensor, KVCache, float]] = {}  # of this prompt, with the seconds it took
        self._ids: dict[int, Tensor] = {}  # by rows: where graphs find the tokens
        self._graphs: dict[Any, tuple[Callable[[], None], Tensor, KVCache]] = {}  # with what they write

    def __call__(
        self, prompt: Sequence[int], taps: Sequence[int] = (), drafter: Drafter | None = None
    ) -> tuple[Tensor, KVCache, KVCache | None, float]:
        """Features [1, n, (1 + taps) * H], keys and values of the target, and those of a drafter that has layers.

        Last the seconds to be added to those that the call took: what others computed before counts, capture does not.
        """
        if tuple(prompt) != self._prompt:
            self._prompt, self._found = tuple(prompt), {}
        n, off, keys = len(prompt), 0.0, [(tuple(taps), None)]
        if n > 1 and getattr(drafter, "body", None) is not None:
            keys.append((tuple(taps), drafter))
        for key in keys:
            if key in self._found:
                off += self._found[key][2]
                continue
            began, before = time.perf_counter(), self.capture_seconds
            features, cache = self._forward(*key)
            cache.crop(n if key[1] is None else n - 1)
            wait(self.target.device)
            captured = self.capture_seconds - before
            self._found[key] = features, cache, time.perf_counter() - began - captured
            off -= captured
        features, cache, _ = self._found[keys[0]]
        return features[:, :n], cache, self._found[keys[1]][1] if len(keys) > 1 else None, off

    def _rows(self, n: int) -> int:
        """Rows of the graph for n tokens: steps of 128, beyond 512 of 256."""
        step = 128 if n <= 512 else 256
        return min(-(-n // step) * step, self.target.context)

    def _forward(self, taps: tuple[int, ...], drafter: Drafter | None) -> tuple[Tensor, KVCache]:
        """The target's features and cache of the prompt; of a drafter the cache of what follows the first token."""
        features = None if drafter is None else self._found[taps, None][0]
        given = torch.tensor(self._prompt, device=self.target.device)
        if not self.graph:
            return self._work(given, taps, drafter, features)
        size = self._rows(len(given))
        ids = self._ids.setdefault(size, torch.zeros(size, dtype=torch.long, device=given.device))
        ids[: len(given)] = given
        if (key := (size, taps, drafter)) not in self._graphs:
            began, made = time.perf_counter(), []
            replay = _recorded(lambda: made.append(self._work(ids, taps, drafter, features)))
            self._graphs[key] = replay, *made[-1]
            wait(given.device)
            self.capture_seconds += time.perf_counter() - began
        replay, features, cache = self._graphs[key]
        replay()
        return features, cache

    def _work(
        self, ids: Tensor, taps: tuple[int, ...], drafter: Drafter | None, features: Tensor | None
    ) -> tuple[Tensor, KVCache]:
        if drafter is None:
            cache = KVCache(self.target.layers, len(ids))
            return _forward(self.target, ids, cache, taps=taps), cache
        cache = KVCache(len(drafter.body.layers), len(ids))
        drafter.prefill(features[:, :-1], ids[None, 1:], cache)
        return features, cache


def _recorded(work: Callable[[], None], pool: Any = None) -> Callable[[], None]:
    """`work` as a CUDA graph, after it ran once."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _compiled(cache: StaticCache, index: int, layer: nn.Module, tune: bool) -> Callable[..., Tensor]:
    """The forward of layer `index`, compiled once for all layers of a kind: `cache` turns to the layer before."""
    forward = _compile(layer.forward, **(TUNED if tune else {}))

    def run(*args: Any, **kwargs: Any) -> Tensor:
        cache.select(index)
        return forward(*args, **kwargs)

    return run


def _compile(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """Compiled anew where a number of rows or a tree is the second of its kind, then once for all others.

    A symbol for every size from the start takes longer: 75 s against 43 to trace notebook 3's engines on 2 cores.
    """
    return torch.compile(function, options=options or QUICK)


class Engine:
    """Plain (`drafter` None) or speculative decoding of `batch` sequences, with the results of `decode`.

    length: tokens of a prompt and its answer, at most (0: the target's context), for which the caches have room. every:
    rounds between two looks of the host, which with graphs reads them while the next ones run: a sequence stops at most
    2 * every - 1 rounds late.
    graph: rounds are CUDA graphs, one for each bucket of rows that attention sees (None: on a GPU). buckets: their
    sizes, beside the whole cache (None: 256, 512, 1024 ..., so that a short context does not pay for a long one).
    compile_layers: torch.compile every decoder layer (None: in graphs). attention: see `cache.attend`. prompts: shared
    with other engines. Raises `UserError` for what cannot work.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None,
        settings: Settings,
        batch: int = 1,
        length: int = 0,
        every: int = 1,
        graph: bool | None = None,
        compile_layers: bool | None = None,
        attention: str = "auto",
        buckets: Sequence[int] | None = None,
        prompts: Prompts | None = None,
    ) -> None:
        if attention not in caches.ATTENTION:
            raise UserError(f"unknown attention {attention!r}; {nearest(attention, caches.ATTENTION)}")
        if batch < 1 or every < 1:
            raise UserError(f"batch = {batch}, every = {every}: both are 1 or more")
        check(target, [0], dataclasses.replace(settings, max_new_tokens=1), drafter)
        refuse(target)
        device = target.device
        self.graph = device.type == "cuda" if graph is None else graph
        if self.graph and device.type != "cuda":
            raise UserError(f"graph = True, but the target is on {device}: CUDA graphs need a GPU")
        compile_layers = self.graph if compile_layers is None else compile_layers
        self.target, self.drafter, self.settings = target, drafter, settings
        self.prompts = prompts or Prompts(target)
        self.batch, self.every, self.attention = batch, every, attention
        self.sampler = Sampler(target, settings)
        self.sampler.noise = _Given(self.sampler.noise.dtype, {})  # the kind that every round finds, compiled once
        self.plan, self.depth, nodes, scratch, taps = None, 0, 0, 0, ()
        if drafter is not None:
            of = settings
            drafter.ready()
            self.plan = Plan(of.tree, of.k, of.nodes, target.vocab_size, device=device, width=drafter.width)
            self.depth, nodes, taps = self.plan.k, self.plan.nodes, drafter.spec.taps
            scratch = self.depth + drafter.k + (self.depth * self.plan.beam if of.tree == "dynamic" else 0)
        self.margin = max(nodes + 1, scratch)  # rows beyond the known tokens that a round may write
        if length > target.context:
            raise UserError(f"length {length} goes beyond the target's context or sliding window of {target.context}")
        self.length = length or target.context
        # whole blocks, as fused attention likes them; and the same for most trees, or each would be compiled anew
        self.capacity = -(-(self.length + max(self.margin, BLOCK)) // BLOCK) * BLOCK
        sizes = [FIRST << i for i in range(24)] if buckets is None else sorted(buckets)
        self.buckets = [b for b in sizes if b < self.capacity] + [self.capacity]
        self.body, self.pairs = getattr(drafter, "body", None), getattr(drafter, "pairs", None)
        self.cache, self.own = self._caches()
        self.taps = taps
        width = (1 + len(taps)) * target.hidden_size

        def zeros(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=device)

        self.held, self.valid, self.limit, self.seeds = (zeros(batch) for _ in range(4))
        self.valid += 1
        self.following = zeros(batch, self.depth + 1)
        self.features = zeros(batch, self.depth + 1, width, dtype=target.dtype)
        self.fixed = self.plan is None or self.plan.shape is not None
        self.log = zeros(every, batch, 2 + self.depth + 1 + nodes * (1 if self.fixed else 2))
        self.lag = 1 if self.graph else 0  # lots of rounds that run before the host has read the former
        self._pinned = itertools.cycle([self.log.cpu().pin_memory() for _ in range(1 + self.lag)] if self.graph else [])
        self.step = zeros(1)
        self.state = (self.held, self.valid, self.following, self.features, self.log, self.step)
        self.noise: dict[str, Tensor] = {}
        self.trace: Tensor | None = None
        self.capture_seconds = 0.0
        self._drop_graphs()
        self._compiled: dict[tuple[nn.Module, str], Callable[..., Any]] = {}  # what stands for a module's function
        self._joined: list[tuple[nn.Module, str, nn.Module]] = []
        self._fast: dict[str, Callable[..., Any]] = {}  # of functions: a method would hold the engine
        if compile_layers:
            self._compile_parts()

    def _compile_parts(self) -> None:
        """Few kernels instead of many: layers, norms, angles, noise, the tree, the walk and what follows from it."""
        bodies = [(self.cache, self.target.model.base_model), *([(self.own, self.body)] if self.body else [])]
        timed = self.target.dtype.itemsize < 4  # float32 on a GPU is for comparing tokens: its kernels need no tuning
        for cache, body in bodies:
            self._joined += joined.parts(body)
            single = self.drafter is None or (body is self.body and not self.drafter.one_pass)  # passes of one row
            for index, layer in enumerate(getattr(body, "layers", ())):
                self._compiled[layer, "forward"] = _compiled(cache, index, layer, single and timed)
            rest = [part for part in body.children() if not isinstance(part, nn.ModuleList | nn.Embedding)]
            self._compiled |= {(part, "forward"): _compile(part.forward) for part in rest}
            cache.lay_out = _compile(StaticCache._lay_out)
        if self.drafter is not None:
            of = self.drafter
            self._compiled |= {(of, name): _compile(getattr(of, name)) for name in of.glue}
        names = ("_begin", "_plant", "_propose", "_feed", "_walk", "_advance")
        self._fast = {name: _compile(getattr(Engine, name), **SHORT) for name in names}

    def _do(self, name: str, *given: Any) -> Any:
        """A method by its name, compiled where it is."""
        return self._fast.get(name, getattr(Engine, name))(self, *given)

    def _caches(self) -> tuple[StaticCache, StaticCache | None]:
        def made(layers: int, config: Any, like: Tensor) -> StaticCache:
            queries, keys, width = heads(config)
            found = StaticCache(layers, self.batch, keys, self.capacity, width, like.dtype, like.device)
            found.groups, found.attention = queries // keys, self.attention
            return found

        body = self.body
        weight = self.target.model.get_input_embeddings().weight
        own = None if body is None else made(len(body.layers), body.rotary.config, body.norm.weight)
        return made(self.target.layers, self.target.config, weight), own

    # --- the round ---------------------------------------------------------------------------------------------------

    def _draft(self) -> Tree | None:
        length, self.noise = self._do("_begin")
        if self.drafter is None:
            return None
        if self.own is not None:
            self.own.length = length
        self.sampler.noise = _Given(self.sampler.noise.dtype, self.noise)
        given = self.features, self.following
        if self.drafter.link is not None:
            hidden = self.drafter.ahead(*given, self.plan.k, self.own, self.valid)
            return self._do("_plant", self.drafter.logits(hidden, 0), hidden)
        if self.drafter.one_pass:
            return self._do("_plant", self.drafter.marginals(*given, self.plan.k, self.own, self.valid))
        propose = functools.partial(self._do, "_propose")
        return self.drafter.draft(*given, self.plan, propose, self.own, self.valid)

    def _begin(self) -> tuple[Tensor, dict[str, Tensor]]:
        """How many rows the drafter has been shown [B], and the noise of the round.

        The noise is made apart from what reads it: within an arg max over the vocabulary one block would make a row.
        """
        shown = self.held if self.drafter is None else (self.held - self.valid).clamp(min=0)
        return shown, self._noise()

    def _propose(self, logits: Tensor, slots: slice) -> Candidates:
        """Of one slot: with a start and a stop of their own the noise's rows would number a difference of symbols."""
        return self.sampler.propose(self.plan)(logits, slice(slots.start, slots.start + 1))

    def _plant(self, logits: Tensor, hidden: Tensor | None = None) -> Tree:
        """The tree of a one-pass drafter from its logits [B, k, V], and from its rows [B, k, H] if they are linked."""
        propose = self.sampler.propose(self.plan)
        if hidden is None:
            return self.plan(propose(logits, slice(0, self.plan.k)))
        root = last(self.following[..., None], self.valid)[:, 0, 0]
        return plant(self.pairs, logits, hidden, root, self.plan, propose)

    def _noise(self) -> dict[str, Tensor]:
        """The noise of a round, each with a leading B (see `verify.Noise`)."""
        of, plan, dtype, vocab = self.settings, self.plan, self.sampler.noise.dtype, self.target.vocab_size
        start, batch, made = self.held + 1, self.batch, {}
        if of.temperature == 0:
            return made
        if plan is None or of.rule == "coupled":
            count = self.depth + 1
            at = (start[:, None] + torch.arange(count, device=start.device)).flatten()
            rows = gumbel(self.seeds.repeat_interleave(count), at, vocab, dtype)
            return {"rows": rows.view(batch, count, vocab)}
        made["emit"] = gumbel(self.seeds, start, vocab, dtype, EMIT)
        made["drafts"] = gumbel(self.seeds, start, plan.k * vocab, dtype, DRAFT).view(batch, plan.k, vocab)
        draws = uniform(self.seeds, start, plan.k * plan.siblings, ACCEPT)
        made["accepts"] = draws.view(batch, plan.k, plan.siblings)
        return made

    def _feed(self, tree: Tree | None) -> tuple[Tensor, Tensor, Any]:
        """What the target is fed, the root and the tree [B, N + 1], the position ids, and the mask."""
        fed = last(self.following[..., None], self.valid)[..., 0]
        seen, ahead = None, 0
        if tree is not None:
            fed = torch.cat([fed, tree.tokens], 1)
            if self.plan.kind != "chain":
                seen, ahead = tree.shape.mask, torch.nn.functional.pad(tree.shape.depth, (1, 0))
        self.cache.length = self.held
        return fed, *self.cache.layout(fed.shape[1], fed.device, seen, ahead)

    def _verify(self, tree: Tree | None) -> tuple[Tensor, Tensor, Tensor]:
        """The target's forward over the root and the tree: tokens fed [B, N + 1], features, logits."""
        fed, place, mask = self._do("_feed", tree)
        self.cache.mark(mask)
        features = self.target.features(fed, place, mask, self.cache, self.taps)
        return fed, features, self.target.logits(features)

    def _walk(self, tree: Tree | None, logits: Tensor) -> Verdict:
        """Verdicts with a leading B: `decode`'s rule on every sequence, by vmap."""
        sampler, plan, dtype = self.sampler, self.plan, self.sampler.noise.dtype
        given: dict[str, Any] = {"logits": logits, "noise": self.noise}
        if tree is not None:
            given["tokens"] = tree.tokens
            if not self.fixed:
                given["shape"] = tuple(tree.shape)
            if tree.q is not None:
                given["q"] = tree.q
            if tree.draw.ndim > 1:
                given["draw"] = tree.draw

        def one(of: dict[str, Any]) -> tuple[Tensor, ...]:
            sampler.noise = _Given(dtype, of["noise"])
            if tree is None:
                token = sampler.choose(of["logits"], 0)
                return torch.zeros_like(token), torch.zeros_like(token[0]), token[0]
            shape = Shape(*of["shape"]) if "shape" in of else plan.shape
            draft = Tree(of["tokens"], shape, of.get("q"), of.get("draw", tree.draw))
            return tuple(sampler.verdict(draft, of["logits"], plan))

        if self.batch > 1:
            verdict = Verdict(*torch.vmap(one)(given))
        else:
            verdict = Verdict(*(part[None] for part in one(pytree.tree_map(lambda part: part[0], given))))
        sampler.noise = _Given(dtype, given["noise"])  # what vmap gave `one` may not outlive it in a compiled walk
        if self.trace is None:
            return verdict
        count = self.trace[self.step % len(self.trace)].expand(self.batch)
        rows = torch.arange(self.depth + 1, device=count.device)
        return Verdict(torch.minimum(rows, count[:, None]), count, verdict.token)

    def _commit(self, tree: Tree | None, fed: Tensor, features: Tensor, verdict: Verdict) -> None:
        if tree is not None and self.plan.kind != "chain":
            self.cache.commit(self.held, verdict.path)  # never compiled: the compiler would copy the whole cache
        self._do("_advance", tree, fed, features, verdict)

    def _advance(self, tree: Tree | None, fed: Tensor, features: Tensor, verdict: Verdict) -> None:
        """Log what was accepted, and what the drafter is yet to be shown."""
        path, count, token = verdict
        line = [count[:, None], token[:, None], path]
        if tree is not None:
            line += [tree.tokens] if self.fixed else [tree.tokens, tree.shape.parent]
        self.log.index_copy_(0, self.step % self.every, torch.cat(line, 1)[None])
        self.step += 1
        slot = torch.arange(self.depth + 1, device=path.device)
        after = torch.nn.functional.pad(fed.gather(1, path[:, 1:]), (0, 1))
        self.following.copy_(torch.where(slot < count[:, None], after, token[:, None]))
        self.features.copy_(gather(features, path))
        self.valid.copy_(count + 1)
        self.held.copy_(torch.minimum(self.held + count + 1, self.limit))  # what is done runs on, but not for ever

    def _round(self) -> None:
        tree = self._draft()
        fed, features, logits = self._verify(tree)
        self._commit(tree, fed, features, self._do("_walk", tree, logits))

    # --- graphs ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _inside(self, bucket: int) -> Iterator[None]:
        """Inside, target and drafter attend by `cache.attend` to `bucket` rows, and run their compiled layers."""
        name = caches.register(self.attention)
        configs = [self.target.config, *([self.body.rotary.config] if self.body else [])]
        own = [config._attn_implementation for config in configs]
        for cache in (self.cache, self.own):
            if cache is not None:  # transformers' caches of no layers are false
                cache.see(bucket, one_of_many=len(self.buckets) > 1)
        with contextlib.ExitStack() as stack:
            stack.enter_context(joined.swapped(self._joined))
            if self._compiled:
                patch = {"allow_unspec_int_on_nn_module": True, "recompile_limit": 256}  # layer_idx; trees and batches
                stack.enter_context(torch._dynamo.config.patch(patch))
            try:
                for config in configs:
                    config._attn_implementation = name
                for (module, name), function in self._compiled.items():
                    setattr(module, name, function)
                yield
            finally:
                for config, before in zip(configs, own, strict=True):
                    config._attn_implementation = before
                for module, name in self._compiled:
                    module.__dict__.pop(name, None)

    def _graphed(self, work: Callable[[], None], pool: Any) -> Callable[[], None]:
        """`work` as a CUDA graph; the state is as before, but for what `work` writes to tensors of its own."""
        with self._unchanged():
            return _recorded(work, pool)

    @contextlib.contextmanager
    def _unchanged(self) -> Iterator[None]:
        """The state is as before afterwards."""
        before = [part.clone() for part in self.state]
        yield
        for part, kept in zip(self.state, before, strict=True):
            part.copy_(kept)

    def _widen(self) -> None:
        """A plain step at a large bucket: its kernels are made for the first size that they meet, and then serve all.

        Made for 256 rows one sums 2,000 in eight turns; made for 2,000 it sums 256 in one. The whole cache is no such
        size: what is compiled there serves no other.
        """
        wide = max((bucket for bucket in self.buckets[:-1] if bucket <= WIDE), default=0)
        if wide and self._compiled and self.drafter is None:
            with self._inside(wide), self._unchanged():
                self._round()

    def _drop_graphs(self) -> None:
        """Rounds are captured anew, in a pool of their own: the old one ends with the last of its graphs."""
        self._runs: dict[int, Callable[[], None]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.graph else None

    def _bucket(self, reach: int) -> int:
        """The smallest bucket with `reach` rows."""
        return next((b for b in self.buckets if b >= reach), self.capacity)

    def _run(self, bucket: int) -> Callable[[], None]:
        """A round whose attention sees `bucket` rows: a graph, captured at its first use."""
        if bucket not in self._runs:
            if not self.graph:

                def work() -> None:
                    with self._inside(bucket):
                        self._round()

                self._runs[bucket] = work
            else:
                began = time.perf_counter()
                if not self._runs:
                    self._widen()
                with self._inside(bucket):
                    self._runs[bucket] = self._graphed(self._round, self._pool)
                torch.cuda.synchronize()
                self.capture_seconds += time.perf_counter() - began
        return self._runs[bucket]

    # --- generation --------------------------------------------------------------------------------------------------

    def replay(self, accepted: Tensor | None) -> None:
        """Take counts of accepted nodes, int [R], in turn (again from the first after the last) instead of verdicts.

        The work is the same, the text is none: the first nodes stand for the accepted path. A count beyond the depth
        of the tree is cut to it. None: verify again.
        """
        if accepted is not None and (self.drafter is None or not len(accepted)):
            raise UserError("a replay needs a drafter, and counts of accepted tokens")
        if accepted is not None:
            accepted = accepted.to(self.target.device, torch.long).clamp(0, min(self.depth, self.plan.nodes))
        self.trace = accepted
        self._drop_graphs()

    @torch.no_grad()
    def generate(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int] | None = None) -> list[Generation]:
        """What `decode` generates from these prompts with these seeds, `batch` at a time. Raises `UserError`.

        Seconds: `prefill` is each one's own; `verify` (rounds until the host has read them) and `host` are those of
        the batch. Capture is in `capture_seconds`.
        """
        seeds = [self.settings.seed] * len(prompts) if seeds is None else seeds
        for prompt in prompts:
            check(self.target, prompt, self.settings, self.drafter)
            self._check_length(len(prompt) + self.settings.max_new_tokens)
        made = []
        for i in range(0, len(prompts), self.batch):
            made += self._together(prompts[i : i + self.batch], seeds[i : i + self.batch])
        return made

    def _check_length(self, need: int) -> None:
        if need > self.length:
            cure = "raise its length" if self.length < self.target.context else "shorten the prompt"
            raise UserError(f"the engine has room for {self.length} tokens, {need} are needed: {cure}")

    def _together(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int]) -> list[Generation]:
        made = [Generation(list(prompt)) for prompt in prompts]
        stops = [Stops(of, self.settings) for of in made]
        for row, (of, stop) in enumerate(zip(made, stops, strict=True)):
            began = time.perf_counter()
            token, off = self._prefill(row, of.prompt, seeds[row])
            stop.add([token])
            of.seconds["prefill"] = time.perf_counter() - began + off
        self.limit[len(made) :] = 0  # rows of the batch that are not used
        self.step.zero_()
        held, launched, most = [len(prompt) for prompt in prompts], 0, self.settings.max_new_tokens
        parent = {} if self.fixed is False or self.depth == 0 else {"parent": self.plan.shape.parent.tolist()}
        flying: deque[tuple[range, Callable[[], list[Any]]]] = deque()  # rounds that the host has yet to read
        mark = time.perf_counter()
        while live := [row for row, stop in enumerate(stops) if not stop.done]:
            unread = sum(len(turns) for turns, _ in flying)
            # rounds that are needed even if all is accepted: one in vain costs a round, to wait a part of one
            needed = max(math.ceil((most - len(made[row].tokens)) / (self.depth + 1)) for row in live)
            if (rounds := min(self.every, needed - unread)) > 0:
                far = (unread + rounds) * (self.depth + 1)
                ahead = [min(held[row] + far, len(prompts[row]) + most) for row in live]
                captured = self.capture_seconds
                run = self._run(self._bucket(max(ahead) + self.margin))
                mark += self.capture_seconds - captured
                for _ in range(rounds):
                    run()
                flying.append((range(launched, launched + rounds), self._read()))
                launched += rounds
                if len(flying) <= self.lag:
                    continue
            turns, read = flying.popleft()
            lines, now = read(), time.perf_counter()
            verify = now - mark
            for turn in turns:
                for row in live:
                    if not stops[row].done:
                        held[row] += self._take(lines[turn % self.every][row], made[row], stops[row], parent)
            mark = time.perf_counter()
            host = 0.0 if flying else mark - now  # the device goes on meanwhile
            for of in made:
                of.seconds["verify"] += verify + (mark - now - host)
                of.seconds["host"] += host
        wait(self.target.device)  # for the rounds in vain
        for of in made:
            of.seconds["verify"] += time.perf_counter() - mark
        return made

    def _read(self) -> Callable[[], list[Any]]:
        """Starts to copy the log to the host; what it returns waits for that, and gives the lines."""
        if not self.graph:
            return functools.partial(list, self.log.tolist())
        to = next(self._pinned)
        to.copy_(self.log, non_blocking=True)
        done = torch.cuda.Event()
        done.record()

        def read() -> list[Any]:
            done.synchronize()
            return to.tolist()

        return read

    def _take(self, line: list[int], of: Generation, stops: Stops, parent: dict[str, list[int]]) -> int:
        """Add a round that the log tells of; returns how many tokens it gave."""
        (count, token), path, drafted = line[:2], line[2 : 3 + self.depth], line[3 + self.depth :]
        path = path[: count + 1]
        if self.drafter is not None:
            if not self.fixed:
                half = len(drafted) // 2
                parent, drafted = {"parent": drafted[half:]}, drafted[:half]
            grown = {} if self.plan.kind == "chain" else {**parent, "path": path}
            of.rounds.append(Round(len(of.tokens), drafted, count, **grown))
        stops.add([*(drafted[row - 1] for row in path[1:]), token])
        return count + 1

    def _prefill(self, row: int, prompt: Sequence[int], seed: int) -> tuple[int, float]:
        """Sequence `row` begins with this prompt, as in `decode`; the first token, and the seconds to be added."""
        target, n = self.target, len(prompt)
        features, cache, own, off = self.prompts(prompt, self.taps, self.drafter)
        sampler = Sampler(target, dataclasses.replace(self.settings, seed=seed))
        token = sampler.choose(target.logits(features[0, -1:]), n)
        if own is not None:
            self.own.load(row, own)
        self.cache.load(row, cache)
        self.held[row], self.valid[row], self.seeds[row] = n, 1, seed
        self.limit[row] = n + self.settings.max_new_tokens
        self.features[row, 0], self.following[row, 0] = features[0, -1], token[0]
        return int(token), off

    @torch.no_grad()
    def parts(
        self, prompt: Sequence[int], repeats: int = 30, names: Sequence[str] = (*PARTS, "round")
    ) -> dict[str, float]:
        """Milliseconds of a round's parts, each repeated alone at this length, and of the whole `round`.

        `names` may leave out the last ones: a part stands on what the one before it made.
        """
        check(self.target, prompt, self.settings, self.drafter)
        self._check_length(reach := len(prompt) + 2 * (self.depth + 1))
        for row in range(self.batch):
            self._prefill(row, prompt, row)
        bucket = self._bucket(reach + self.margin)
        work: dict[str, Callable[[], None]] = {}
        box, made = {}, {}
        if "round" in names:
            work["round"] = self._run(bucket)
            work["round"]()
            self.limit.copy_(self.held)  # stands still

        def verify() -> None:
            box["fed"], box["features"], box["logits"] = self._verify(box["tree"])

        work |= {
            "draft": lambda: box.update(tree=self._draft()),
            "verify": verify,
            "walk": lambda: box.update(verdict=self._do("_walk", box["tree"], box["logits"])),
            "commit": lambda: self._commit(box["tree"], box["fed"], box["features"], box["verdict"]),
        }
        pool = torch.cuda.graph_pool_handle() if self.graph else None  # a pool is done with once it has no graph left
        with self._inside(bucket):
            for name in names:
                run = self._graphed(work[name], pool) if self.graph and name != "round" else work[name]
                for turn in range(repeats + 3):
                    if turn == 3:
                        wait(self.target.device)
                        began = time.perf_counter()
                    run()
                wait(self.target.device)
                made[name] = 1e3 * (time.perf_counter() - began) / repeats
        return made

    def close(self) -> None:
        """Give the memory of caches and graphs back. The engine is of no use afterwards."""
        self._drop_graphs()
        del self.prompts
        for cache in (self.cache, self.own):
            if cache is not None:  # transformers' caches of no layers are false
                cache.close()


class Engines:
    """Generation by a method's name, each way of decoding with an engine of its own, made at its first use.

    Options are `Engine`'s, `batch` excepted: one prompt at a time.
    """

    def __init__(self, target: Target, drafters: dict[str, Drafter], **options: Any) -> None:
        self.target, self.drafters, self.options = target, drafters, {"prompts": Prompts(target), **options}
        self.made: dict[tuple[str, Settings], Engine] = {}

    def __call__(self, method: str, prompt: Sequence[int], settings: Settings) -> Generation:
        """`plain` or a drafter's name."""
        free = {name: getattr(Settings(), name) for name in ("max_new_tokens", "seed", "stop_tokens", "repeat_stop")}
        key = method, dataclasses.replace(settings, **free)  # what a graph holds
        if key not in self.made:
            self.made[key] = Engine(self.target, self.drafters.get(method), key[1], **self.options)
        self.made[key].settings = settings
        return self.made[key].generate([prompt], [settings.seed])[0]

    @property
    def capture_seconds(self) -> float:
        """Seconds that warming up and capturing graphs took so far."""
        return sum(of.capture_seconds for of in (self.options["prompts"], *self.made.values()))
