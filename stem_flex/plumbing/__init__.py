"""What the stages stand on and users need not know. Imports nothing of `stem_flex` but `config`.

===============  ==============================================================================================
`checks`         what every public function takes
`sharded`        DTensors: each rank's own heads
`implementation` Triton or PyTorch, by an explicit name
`geometry`       sizes, offsets and lengths that a layout is bound to
`structure`      what a layout tells the binding
`binding`        from a layout and sizes to facts about each row of blocks
`slices`         some rows of a bound layout, as a binding of their own
`classes`        exact classes of block pairs of any mask_mod
`mods`           the mask_mods of bound layouts
`captured`       what a mask_mod or score_mod reads
`spans`          where each packed document starts and ends
`tables`         compact index tables and their BlockMask
`compiled`       torch.compile of one function for many kinds of call
`backend`        which attention kernel runs, with which options
`dense`          the fastest dense causal attention at hand
===============  ==============================================================================================
"""
