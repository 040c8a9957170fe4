"""The projection that ends a sublayer is found where it writes linearly into the residual stream, in every family."""

import pytest

from lib.models.decoder import Decoder
from lib.models.residual_writers import find_writer, has_writers, is_sequential
from tests.families import FAMILIES, tiny_model

POST_NORM = ("Gemma2", "Gemma3", "Olmo2")  # a norm stands between projection and residual stream
PARALLEL = ("Phi", "GPTNeoX", "Falcon")


@pytest.mark.parametrize("family", FAMILIES)
def test_projections_that_write_linearly_are_found(family):
    decoder = Decoder(tiny_model(family))
    for kind in ("attention", "mlp"):
        writer = find_writer(decoder, 1, kind)
        writes = family not in POST_NORM and (family, kind) != ("Mixtral", "mlp")
        assert (writer is not None) == writes
        if writer:
            assert writer.scale == pytest.approx(0.5 if family == "Granite" else 1.0, rel=1e-4)
            assert writer.matrix.shape[1] == 32
    assert has_writers(decoder) == (family not in POST_NORM)
    assert is_sequential(decoder, 1) == (family not in PARALLEL)
