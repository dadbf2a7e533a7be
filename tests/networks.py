"""Networks in tests: random ones, for compiling real initialisers costs more than most tests."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from liveavatar_jax.paths import leaves, replace


def random(make: Any, seed: int = 0) -> Any:
    """The module that `make()` describes, with weights none of which is zero or plain."""
    abstract = jax.eval_shape(make)
    rng = np.random.default_rng(seed)

    def draw(path: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        x = rng.standard_normal(leaf.shape, np.float32)
        name = path.rsplit(".", 1)[-1]
        if name in ("scale", "gamma", "g"):
            x = 1 + 0.1 * x
        elif len(leaf.shape) > 1 and name in ("kernel", "v"):
            x = x / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            x = 0.1 * x
        return jnp.asarray(x, leaf.dtype)

    return replace(abstract, {path: draw(path, leaf) for path, leaf in leaves(abstract).items()})


def same(a: Any, b: Any) -> None:
    """Asserts that two modules have equal weights, of equal dtypes, at equal paths."""
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path in a:
        assert a[path].dtype == b[path].dtype
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)
