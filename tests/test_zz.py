import tests.test_random_resumes as t
from tests.test_random_resumes import *
from tests.pretended_gpu import *
real = Options.draw
def draw(r):
    o = real(r); o.base_dtype="float32"; o.memory["offload_blocks"]=False; o.steps=min(o.steps,6); return o
@pytest.mark.parametrize("number", range(RUNS))
def test_gpu(number, request, encode_image, trainer_options, tmp_path, monkeypatch):
    monkeypatch.setattr(Options, "draw", draw)
    del trainer_options["accelerator"]
    class O(dict):
        def __or__(self, other): return dict(self) | other | {"strategy": OneGPU()}
    real_w = t.write_shards
    with pretended_gpu():
        t.test_a_run_that_is_resumed_equals_one_that_was_never_stopped(number, request, encode_image, O(trainer_options), tmp_path)
