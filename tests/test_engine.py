"""Static shapes change nothing: the engine gives the tokens and rounds of decode.py, whatever drafter, tree, batch."""

import dataclasses
import itertools

import pytest
import torch
import toys
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import FalconConfig, MistralConfig, Qwen2Config

from psnb import cache, decode, engine
from psnb.cache import KVCache, StaticCache
from psnb.decode import Settings
from psnb.engine import PARTS, Engine, Prompts
from psnb.errors import UserError
from psnb.tree import fixed, paths

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
PROMPTS = [PROMPT, PROMPT[:1], PROMPT * 3, [2, 6, *([7, 8, 9] * 6)]]  # the last one repeats itself soon at T = 0
KINDS = [None, *toys.KINDS]


def reference(target, drafter, prompt, settings):
    if drafter is None:
        return decode.autoregressive(target, prompt, settings)
    return decode.speculative(target, drafter, prompt, settings)


def assert_same(made, target, drafter, prompts, settings, seeds):
    assert len(made) == len(prompts)
    for one, prompt, seed in zip(made, prompts, seeds, strict=True):
        expected = reference(target, drafter, prompt, dataclasses.replace(settings, seed=seed))
        assert (one.tokens, one.stopped, one.repeated) == (expected.tokens, expected.stopped, expected.repeated)
        assert one.rounds == expected.rounds


def trees(drafter):
    if drafter is None:
        return [("chain", 1, 0)]
    own = "best_first" if drafter.one_pass else "dynamic"
    return [("chain", 4, 0), ("static", 4, 9), (own, 4, 14), ("chain", 1, 0)]


@pytest.mark.parametrize("rule", ["greedy", "coupled", "rejection", "block"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_equals_decoding_one_by_one(kind, rule):
    """Prompts of 1 to 24 tokens, three at a time and then one in a batch of three; buckets are crossed on the way."""
    target = toys.target(torch.float64)
    drafter = kind and toys.drafter(kind, target)
    temperature, rule, used = (0.0, "coupled", set()) if rule == "greedy" else (0.7, rule, set())
    for (tree, k, nodes), every, lag in zip(trees(drafter), (8, 3, 1, 3), (0, 0, 1, 1), strict=False):
        if rule == "block" and tree != "chain":
            continue
        settings = Settings(k=k, tree=tree, nodes=nodes, temperature=temperature, rule=rule, max_new_tokens=29)
        engine = Engine(target, drafter, settings, batch=3, every=every, buckets=range(40, 120, 16))
        engine.lag = lag  # as with graphs
        assert_same(engine.generate(PROMPTS, range(4)), target, drafter, PROMPTS, settings, range(4))
        used |= engine._runs.keys()
    assert len(used) > 1  # or no bucket was crossed


@pytest.mark.parametrize(("every", "lag"), [(1, 0), (8, 0), (1, 1), (3, 1)])
@pytest.mark.parametrize("kind", KINDS)
def test_one_sequence_stops_where_decoding_stops(kind, every, lag):
    """By length, by a stop token in the middle of a round, and by repetition."""
    target = toys.target(torch.float64)
    drafter = kind and toys.drafter(kind, target)
    settings = Settings(k=4, temperature=0.7, max_new_tokens=30, seed=5, repeat_stop=0)
    stop = reference(target, drafter, PROMPT, settings).tokens[17]
    repeating = dataclasses.replace(settings, temperature=0.01, repeat_stop=6, max_new_tokens=80)
    how = []
    for one in (settings, dataclasses.replace(settings, stop_tokens=(stop,)), repeating):
        engine = Engine(target, drafter, one, every=every, buckets=(24, 40))
        engine.lag = lag
        made = engine.generate([PROMPT])
        assert_same(made, target, drafter, [PROMPT], one, [5])
        how.append(made[0].stopped)
        if how[-1] == "length":  # no round was in vain
            assert int(engine.step) == (len(made[0].rounds) or len(made[0].tokens) - 1)
    assert how[:2] == ["length", "stop"]


@pytest.mark.parametrize("cls", [Qwen2Config, MistralConfig])
@pytest.mark.parametrize("attention", cache.ATTENTION)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_architectures_and_attentions(cls, attention):
    target = toys.target(torch.float64, cls=cls)
    for kind, tree in (("eagle-ps", "best_first"), ("eagle", "dynamic"), (None, "chain")):
        drafter = kind and toys.drafter(kind, target)
        settings = Settings(k=3, tree=tree, nodes=8, temperature=0.7, max_new_tokens=20, repeat_stop=0)
        engine = Engine(target, drafter, settings, batch=2, buckets=(32,), attention=attention)
        assert_same(engine.generate(PROMPTS[:2], [4, 5]), target, drafter, PROMPTS[:2], settings, [4, 5])
    assert target.config._attn_implementation == "sdpa"  # as before


@pytest.mark.parametrize("changes", [{"taps": [1]}, {"layers": 2, "mask_mode": "shared"}], ids=str)
@pytest.mark.parametrize("kind", ["eagle-ps", "medusa-ps"])
def test_variants_of_the_parallel_drafters(kind, changes):
    target = toys.target(torch.float64)
    drafter = toys.drafter(kind, target, **changes)
    settings = Settings(k=4, tree="best_first", nodes=9, temperature=0.7, max_new_tokens=20, top_k=20, top_p=0.9)
    engine = Engine(target, drafter, settings, batch=2)
    assert_same(engine.generate(PROMPTS, range(4)), target, drafter, PROMPTS, settings, range(4))


@pytest.mark.parametrize("kind", ["eagle-ps", "eagle-ps linked"])
def test_compiled_parts_change_nothing(kind, monkeypatch):
    """Traced without a break, once for both layers, with joined projections."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(engine, "_compile", lambda f, **options: torch.compile(f, backend="eager"))
    target = toys.target(torch.float64)
    drafter = toys.drafter(kind, target)
    settings = Settings(k=2, tree="best_first", nodes=4, temperature=0.7, max_new_tokens=12, repeat_stop=0)
    one = Engine(target, drafter, settings, compile_layers=True)
    assert_same(one.generate([PROMPT]), target, drafter, [PROMPT], settings, [0])
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] <= 14
    assert type(target.model.model.layers[0].mlp.up_proj) is torch.nn.Linear  # as before
    rows = one.cache.all_keys
    one.close()
    assert rows.untyped_storage().nbytes() == 0  # on a GPU the next engine needs the room


TRIED = [("eagle-ps", "chain"), ("eagle-ps", "best_first"), ("eagle-ps linked", "best_first"), ("eagle", "chain")]


@pytest.mark.parametrize(("kind", "tree"), TRIED)
def test_the_third_draft_length_compiles_nothing(kind, tree, monkeypatch):
    """The first is compiled for its sizes, the second for all: notebooks try many."""
    torch._dynamo.reset()
    monkeypatch.setattr(engine, "_compile", lambda f, **options: torch.compile(f, backend="eager"))
    target = toys.target(torch.float64)
    drafter = toys.drafter(kind, target, k=6)
    graphs = []
    for k in (2, 4, 6):
        torch._dynamo.utils.counters.clear()
        settings = Settings(k=k, tree=tree, nodes=2 * k, temperature=0.7, max_new_tokens=12, repeat_stop=0)
        of = Engine(target, drafter, settings, compile_layers=True)
        assert_same(of.generate([PROMPT]), target, drafter, [PROMPT], settings, [0])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    plants = "linked" in kind  # paths along linked candidates are followed slot by slot, written out
    assert graphs[0] > graphs[1] > graphs[2] == plants, graphs


@pytest.mark.parametrize(("kind", "tree"), [(None, "chain"), ("eagle-ps", "best_first"), ("eagle", "dynamic")])
def test_the_second_bucket_compiles_nothing(kind, tree, monkeypatch):
    """How many rows attention sees is a symbol from the start: the one size of a notebook that is sure to change."""
    torch._dynamo.reset()
    monkeypatch.setattr(engine, "_compile", lambda f, **options: torch.compile(f, backend="eager"))
    target = toys.target(torch.float64)
    drafter = kind and toys.drafter(kind, target)
    settings = Settings(k=3, tree=tree, nodes=8, temperature=0.7, max_new_tokens=9, repeat_stop=0)
    of = Engine(target, drafter, settings, compile_layers=True, buckets=(40, 56, 72))
    torch._dynamo.utils.counters.clear()
    graphs = []
    for count in (8, 36, 52):
        prompt = (PROMPT * 9)[:count]
        assert_same(of.generate([prompt]), target, drafter, [prompt], settings, [0])
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(of._runs) == 3 and graphs[0] and graphs[0] == graphs[2], graphs


@torch.no_grad()
def test_the_kernels_of_a_plain_step_are_made_for_a_large_bucket(monkeypatch):
    """As on a GPU, where they are chosen by timing: first for the largest bucket but one, which leaves no trace."""
    buckets, met = (40, 56, 72), []

    def seen(graph, inputs):
        met.extend(size for x in inputs if isinstance(x, torch.Tensor) for size in x.shape if size in buckets)
        return graph.forward

    monkeypatch.setattr(engine, "_compile", lambda f, **options: torch.compile(f, backend=seen))
    monkeypatch.setattr(engine, "_recorded", lambda work, pool: work())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    target = toys.target(torch.float64)
    settings = Settings(temperature=0.7, max_new_tokens=9, repeat_stop=0)
    for graph in (False, True):
        torch._dynamo.reset()
        met.clear()
        of = Engine(target, None, settings, compile_layers=True, buckets=buckets)
        of._prefill(0, PROMPT, 0)
        of.graph, before = graph, [part.clone() for part in of.state]
        run = of._run(40)
        if not graph:
            run()
        else:
            assert all(torch.equal(part, kept) for part, kept in zip(of.state, before, strict=True))
        assert set(met) == {72 if graph else 40}
        of.graph, of._runs = False, {}
        assert_same(of.generate([PROMPT]), target, None, [PROMPT], settings, [0])


def test_no_size_of_a_level_is_a_difference_of_symbols():
    """On a GPU torch 2.11 refuses such sizes in a batch; and the options are the compiler's own."""
    torch._dynamo.reset()
    given = []

    def record(graph, inputs):
        given.extend(x.node.expr for x in inputs if isinstance(x, torch.SymInt))
        return graph.forward

    target = toys.target(torch.float64)
    drafter = toys.drafter("eagle", target)
    settings = Settings(k=3, tree="dynamic", nodes=8, temperature=0.7, max_new_tokens=9, repeat_stop=0)
    for count in (1, 2):
        of = Engine(target, drafter, settings, batch=count)
        of._fast = {"_propose": torch.compile(Engine._propose, backend=record)}
        assert_same(
            of.generate(PROMPTS[:count], range(count)), target, drafter, PROMPTS[:count], settings, range(count)
        )
    assert given and all(size.is_Symbol for size in given), given
    torch.compile(Engine._propose, options=engine.SHORT)


def test_linked_trees_are_compiled_once_for_all_drafters(monkeypatch):
    torch._dynamo.reset()
    monkeypatch.setattr(engine, "_compile", lambda f, **options: torch.compile(f, backend="eager"))
    target, graphs = toys.target(), []
    for kind, nodes in (
        ("medusa-ps linked", 6),
        ("eagle-ps linked", 6),
        ("eagle-ps linked", 9),
        ("eagle-ps linked", 12),
    ):
        settings = Settings(k=4, tree="best_first", nodes=nodes, max_new_tokens=9, repeat_stop=0)
        of = Engine(target, toys.drafter(kind, target), settings, compile_layers=True)
        of._fast = {"_plant": of._fast["_plant"]}
        of._compiled.clear()
        of.cache.lay_out = of.own.lay_out = StaticCache._lay_out
        torch._dynamo.utils.counters.clear()
        assert of.generate([PROMPT])[0].tokens == decode.autoregressive(target, PROMPT, settings).tokens
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 0, 1, 0]  # the second size makes symbols of what differs


def test_a_compiled_walk_keeps_nothing_of_vmap():
    """Traced to its end with functionalised tensors, which the inner ones of vmap must not outlive."""
    target = toys.target(torch.float64)
    settings = Settings(temperature=0.7, max_new_tokens=5, repeat_stop=0)
    two = Engine(target, None, settings, batch=2)
    two._fast = {"_walk": torch.compile(Engine._walk, backend="aot_eager")}
    assert_same(two.generate(PROMPTS[:2], [0, 1]), target, None, PROMPTS[:2], settings, [0, 1])


# --- nothing waits for the device ------------------------------------------------------------------------------------


class NoSync(TorchDispatchMode):
    """Fails on what reads the device, on what makes a size out of data, and on tensors made of Python numbers."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not any(word in str(func) for word in self.FORBIDDEN), func
        made = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(made):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", (func, "made on the CPU")
        return made


def to_meta(thing, seen):
    """Move every tensor that hangs on a psnb object to the device without data."""
    if isinstance(thing, torch.nn.Module):
        return thing.to("meta")
    if isinstance(thing, torch.Tensor):
        return thing.to("meta")
    if isinstance(thing, tuple) and hasattr(thing, "_fields"):
        return type(thing)(*(to_meta(part, seen) for part in thing))
    if isinstance(thing, list | tuple):
        return type(thing)(to_meta(part, seen) for part in thing)
    if type(thing).__module__.startswith("psnb.") and hasattr(thing, "__dict__") and id(thing) not in seen:
        seen.add(id(thing))
        for name, part in vars(thing).items():
            if not isinstance(part, dict):
                object.__setattr__(thing, name, to_meta(part, seen))
    return thing


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_round_asks_nothing_of_the_device(kind, batch):
    """Run without data, where any number read from a tensor fails, and with it, where any CPU tensor would fail."""
    target = toys.target()
    drafter = kind and toys.drafter(kind, target)
    for (tree, k, nodes), temperature in itertools.product(trees(drafter)[:3], (0.0, 0.7)):
        settings = Settings(k=k, tree=tree, nodes=nodes, temperature=temperature)
        target = toys.target()
        drafter = kind and toys.drafter(kind, target)
        engine = Engine(target, drafter, settings, batch=batch)
        to_meta(engine, set())
        with torch.no_grad(), engine._inside(64), NoSync():
            engine._round()


def test_what_is_done_runs_on_within_the_cache():
    target = toys.target()
    settings = Settings(k=4, max_new_tokens=8)
    drafter = toys.drafter("eagle", target)
    engine = Engine(target, drafter, settings, batch=2, length=64)
    assert engine.capacity >= 64 + engine.margin > 64
    engine.generate([PROMPT])
    with torch.no_grad(), engine._inside(engine.capacity):
        for _ in range(60):  # a row beyond the cache would raise
            engine._round()
    assert engine.held.tolist() == [len(PROMPT) + 8, 0]


# --- caches ----------------------------------------------------------------------------------------------------------


def test_the_static_cache_equals_the_growing_one():
    """A prompt, a tree, its accepted path, a chain: features and rows as KVCache has them, in a batch of two."""
    target, shape = toys.target(torch.float64), fixed(paths("static", 4, 9))
    depths = torch.cat([torch.zeros(1, dtype=torch.long), shape.depth])
    one, static = [KVCache(2, 64) for _ in range(2)], StaticCache(2, 2, 2, 64, 8, torch.float64, torch.device("cpu"))
    static.groups = 2
    static.see(48)
    torch.manual_seed(0)
    tree, chain = torch.randint(0, 60, (2, 10)), torch.randint(0, 60, (2, 3))
    path, expected = torch.tensor([[0, 2, 2], [0, 1, 5]]), []
    lengths = [5, 9]
    for row, n in enumerate(lengths):
        decode._forward(target, torch.arange(n), one[row])
        static.load(row, one[row])
        first = decode._forward(target, tree[row], one[row], shape)
        one[row].commit(n, path[row], n + 2)
        expected.append(torch.cat([first, decode._forward(target, chain[row], one[row])], 1))
    held = static.length = torch.tensor(lengths)
    target.config._attn_implementation = cache.register("sdpa")
    place, mask = static.layout(10, held.device, shape.mask, depths)
    assert place.tolist() == [[n + d for d in depths.tolist()] for n in lengths]
    first = target.features(tree, place, mask, static)
    static.commit(held, path)
    static.crop(held + 2)
    made = torch.cat([first, target.features(chain, *static.layout(3, held.device), static)], 1)
    torch.testing.assert_close(made, torch.cat(expected))
    for row, n in enumerate(lengths):
        for index, layer in enumerate(one[row].layers):
            torch.testing.assert_close(static.all_keys[index, row, :, : n + 5], layer.keys[0, :, : n + 5])
            torch.testing.assert_close(static.all_values[index, row, :, : n + 5], layer.values[0, :, : n + 5])


# --- for measurements ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "tree"), [("eagle-ps", "chain"), ("medusa-ps", "best_first"), ("eagle", "dynamic")])
def test_a_replay_accepts_what_the_trace_says(kind, tree):
    target = toys.target()
    settings = Settings(k=4, tree=tree, nodes=12, max_new_tokens=30, repeat_stop=0)
    engine = Engine(target, toys.drafter(kind, target), settings, batch=2, every=3)
    before = engine.generate([PROMPT])[0]
    engine.replay(torch.tensor([2, 0, 1, 9]))
    for made in engine.generate([PROMPT, PROMPT * 2]):
        assert [r.accepted for r in made.rounds] == ([2, 0, 1, 4] * 9)[: len(made.rounds)]
        assert len(made.tokens) == 30
    engine.replay(None)
    assert engine.generate([PROMPT])[0].tokens == before.tokens
    with pytest.raises(UserError, match="a replay needs a drafter"):
        Engine(target, None, settings).replay(torch.tensor([1]))


def test_parts_are_timed_and_change_nothing():
    target = toys.target()
    engine = Engine(target, toys.drafter("eagle", target), Settings(k=3, tree="dynamic", nodes=9), batch=2)
    before = engine.generate([PROMPT])[0].tokens
    taken = engine.parts(PROMPT, repeats=2)
    assert set(taken) == {*PARTS, "round"} and min(taken.values()) > 0
    assert Engine(target, engine.drafter, engine.settings).parts(PROMPT, 2, ["draft"]).keys() == {"draft"}
    with pytest.raises(UserError, match="room for 12 tokens, 16 are needed: raise its length"):
        Engine(target, engine.drafter, engine.settings, length=12).parts(PROMPT)
    assert engine.generate([PROMPT])[0].tokens == before and engine.capture_seconds == 0


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "fast"}, "unknown attention 'fast'"),
        ({"every": 0}, "both are 1 or more"),
        ({"graph": True}, "CUDA graphs need a GPU"),
        ({"length": 1000}, "goes beyond the target's context or sliding window of 256"),
        ({"length": 20}, "room for 20 tokens, 72 are needed"),
    ],
)
def test_what_cannot_be_run_is_refused(options, message):
    target = toys.target()
    with pytest.raises(UserError, match=message):
        Engine(target, toys.drafter("eagle-ps", target), Settings(k=2), **options).generate([PROMPT])


def test_a_window_shorter_than_the_capacity_and_other_states_are_refused():
    target = toys.target(cls=MistralConfig, sliding_window=64)
    settings = Settings(max_new_tokens=8)
    assert Engine(target, None, settings).generate([PROMPT])[0].tokens
    with pytest.raises(UserError, match="sliding window of 64"):
        Engine(target, None, settings, length=256)
    jamba = toys.target()
    jamba.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="plain attention in every layer, this target has linear_attention"):
        Engine(jamba, None, settings)
    stateful = toys.target()
    stateful.model._is_stateful = True
    with pytest.raises(UserError, match="plain attention in every layer, this target has llama"):
        Engine(stateful, None, settings)
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    scaled, by_kind = toys.target(rope_parameters=dynamic), toys.target()
    by_kind.config.rope_parameters = {"sliding_attention": {"rope_type": "default"}, "full_attention": dynamic}
    for one in (scaled, by_kind):
        with pytest.raises(UserError, match="dynamic RoPE looks at the length"):
            Engine(one, None, settings)
    falcon = {"multi_query": True, "alibi": False, "parallel_attn": True, "new_decoder_architecture": False}
    with pytest.raises(UserError, match="2 key heads of 8 in every layer, this target has others: leave notebook 7"):
        Engine(toys.target(cls=FalconConfig, **falcon), None, settings)
    crossed = toys.target()
    crossed.config.add_cross_attention = True
    with pytest.raises(UserError, match="decoder-only"):
        Engine(crossed, None, settings)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_prompt_leaves_what_the_prompt_alone_leaves(kind, monkeypatch):
    """As with graphs, which have 128 rows or the target's context; what is not asked again is not computed again."""
    target = toys.target(torch.float64)
    drafter, ran = kind and toys.drafter(kind, target), []
    layers = len(drafter.body.layers) if getattr(drafter, "body", None) else 0
    monkeypatch.setattr(engine, "_recorded", lambda work: (work(), lambda: ran.append(work))[1])
    for n in (1, 2, 24):
        padded, plain = Prompts(target, graph=True), Prompts(target, graph=False)
        padded._ids[padded._rows(n)] = torch.full((padded._rows(n),), 7)  # an earlier prompt's
        for _ in range(2):
            found, wanted = (of(PROMPTS[2][:n], (), drafter) for of in (padded, plain))
        assert len(ran) == 1 + (n > 1 and layers > 0)
        assert found[0].shape == (1, n, target.hidden_size)
        assert torch.allclose(found[0], wanted[0], atol=1e-12)
        for ours, theirs, rows in ((found[1], wanted[1], n), (found[2], wanted[2], n - 1)):
            assert (ours is None) == (theirs is None)
            for one, other in zip(ours.layers if ours else (), theirs.layers if theirs else (), strict=True):
                assert one.length == other.length == rows < one.keys.shape[2]
                assert torch.allclose(one.keys[:, :, :rows], other.keys[:, :, :rows], atol=1e-12)
                assert torch.allclose(one.values[:, :, :rows], other.values[:, :, :rows], atol=1e-12)
        ran.clear()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("attention", cache.ATTENTION)
@pytest.mark.parametrize("kind", KINDS)
def test_graphs_give_what_eager_decoding_gives(kind, attention, compiled):
    """float64 where the kernels have it; flex attention has not, there a tie may differ, so lengths are compared."""
    dtype = torch.float32 if attention == "flex" else torch.float64
    target = toys.target(dtype, hidden_size=64, intermediate_size=96)  # a head of 16, as flex attention needs
    target.model.cuda()
    drafter = kind and toys.drafter(kind, target).cuda()
    for (tree, k, nodes), batch in itertools.product(trees(drafter)[:3], (1, 3)):
        settings = Settings(k=k, tree=tree, nodes=nodes, temperature=0.7, max_new_tokens=40, repeat_stop=0)
        engine = Engine(
            target,
            drafter,
            settings,
            batch,
            buckets=range(64, 256, 64),
            attention=attention,
            compile_layers=compiled,
        )
        assert engine.graph
        made = engine.generate(PROMPTS, range(4))
        if dtype == torch.float64:
            assert_same(made, target, drafter, PROMPTS, settings, range(4))
        assert [len(one.tokens) for one in made] == [40] * 4 and engine.capture_seconds > 0
        assert min(engine.parts(PROMPT, repeats=2).values()) > 0
