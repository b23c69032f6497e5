"""Attention maps of an encoder, for the tests of several files."""

from tools.attention_maps import Watch


def maps_of(encoder, imgs):
    """(output of an encoder, {layer: attention maps (B, W, heads, n, m)}, {layer: layout})."""
    maps, layouts = {}, {}

    def take(layer, found, layout):
        maps[layer], layouts[layer] = found, layout

    with Watch(encoder, on_maps=take):
        return encoder(imgs), maps, layouts
