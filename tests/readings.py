"""Trees of parameters with what is right for every leaf, and how many leaves are read so."""

import jax
import jax.numpy as jnp
import random_trees

import optax_muon
from optax_muon.matrices.assign import label


def tree_of(shapes, make=lambda path, leaf: leaf):
    """A nested tree of `{path: shape}`; `make` gets the path and the leaf."""
    tree = {}
    for path, shape in shapes.items():
        *above, last = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[last] = make(path, jax.ShapeDtypeStruct(tuple(shape), jnp.float32))
    return tree


def sides(view, shape):
    """The sides of a matrix, without axes of length 1; rows and columns may be swapped."""
    if view is None:
        return None
    rows, cols = ([a % len(shape) for a in axes] for axes in (view.rows, view.cols))
    return random_trees.sides(*(tuple(a for a in axes if shape[a] > 1) for axes in (rows, cols)))


def allowed(leaf):
    """The readings that are right for a leaf of the corpus."""
    wants = [leaf["want"], *leaf.get("also", [])]
    views = [w and optax_muon.View(w["rows"], w["cols"]) for w in wants]
    free = leaf.get("unsure") or (leaf["want"] or {}).get("router")
    return [sides(view, leaf["shape"]) for view in views] + ([None] if free else [])


def score(leaves, make=lambda path, leaf: leaf):
    """The paths that are wrong and those that are refused."""
    table = label(tree_of({p: leaf["shape"] for p, leaf in leaves.items()}, make), strict=False)
    refused = [row.path for row in table.rows if row.interpretations]
    wrong = [
        row.path
        for row in table.rows
        if not row.interpretations and sides(row.view, row.shape) not in allowed(leaves[row.path])
    ]
    return wrong, refused


def read_trees(text):
    """Trees by name, from lines of path, shape and what is right, as data/trees.txt has them."""
    models = {}
    for line in filter(None, text.splitlines()):
        if line.startswith("="):
            models[line[2:]] = current = {}
        elif not line.startswith("#"):
            path, shape, want = line.split()
            groups = [
                [int(axis) for axis in group.split(",")]
                for group in want.lstrip("?").split("|")
                if want != "-"
            ]
            reading = {"rows": groups[0], "cols": groups[1]} if groups else None
            unsure = {"unsure": True} if want.startswith("?") else {}
            leaf = {"shape": [int(n) for n in shape.split(",")], "want": reading, **unsure}
            # A `#` stands for the layers of a loop.
            for layer in range(3 if "#" in path else 1):
                current[path.replace("#", str(layer))] = leaf
    return models
