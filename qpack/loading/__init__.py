"""Loading a packed checkpoint into transformers, experts included: :func:`qpack.load`.

Stock ``from_pretrained`` keeps the experts of a mixture of experts in one 3-D parameter a layer, which bitsandbytes
cannot pack: it loads packed experts as raw bytes and fails in the first forward pass. Here they become Linear layers,
as do Falcon's, which are of a class of its own.
Importing this package loads neither torch nor transformers.
"""
