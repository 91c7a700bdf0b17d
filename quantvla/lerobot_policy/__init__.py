"""A compiled engine as a lerobot policy of type ``quantvla``.

The modules are named as lerobot looks for them: from ``configuration_quantvla`` it derives
``modeling_quantvla`` and ``processor_quantvla``. The distribution ``lerobot_policy_quantvla``
(folder ``plugins/``) makes lerobot import them.
"""
