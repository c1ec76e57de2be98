"""Which experts are dropped first."""

from dsv4.model.reading.rates import CALLS_REMEMBERED, Rates


def name(layer: int, expert: int) -> str:
    return f"layers.{layer}.ffn.experts.{expert}.w1.weight"


def use(rates: Rates, layer: int, *experts: int) -> None:
    names = [name(layer, expert) for expert in experts]
    rates.choose(names)
    for each in names:
        rates.release(each)


def test_the_rarest_is_dropped_first() -> None:
    rates = Rates()
    for experts in ((0, 1), (0, 2), (0, 1)):
        use(rates, 0, *experts)
    assert [rates.take_lowest() for _ in range(4)] == [name(0, 2), name(0, 1), name(0, 0), None]


def test_what_a_layer_is_about_to_use_is_not_dropped() -> None:
    rates = Rates()
    use(rates, 0, 0, 1)
    rates.choose([name(0, 1)])
    assert [rates.take_lowest() for _ in range(2)] == [name(0, 0), None]
    rates.release(name(0, 1))
    assert rates.take_lowest() == name(0, 1)


def test_of_equals_the_one_needed_last_is_dropped() -> None:
    """All experts of all layers in turn, as a long prompt uses them: the layer called last is needed last."""
    rates = Rates()
    for _ in range(3):
        for layer in range(3):
            use(rates, layer, 0, 1)
    use(rates, 0, 0, 1)
    assert [rates.take_lowest() for _ in range(3)] == [name(0, 1), name(0, 0), name(2, 1)]


def test_a_dropped_one_keeps_its_count() -> None:
    rates = Rates()
    for experts in ((0,), (0,), (1,)):
        use(rates, 0, *experts)
    assert [rates.take_lowest(), rates.take_lowest()] == [name(0, 1), name(0, 0)]
    use(rates, 0, 0, 1)
    assert rates.take_lowest() == name(0, 1)


def test_old_uses_count_less() -> None:
    """The first half of a long run chose expert 0, a shorter time since then expert 1."""
    rates = Rates()
    for _ in range(CALLS_REMEMBERED):
        use(rates, 0, 0)
    for _ in range(CALLS_REMEMBERED * 3 // 4):
        use(rates, 0, 1)
    assert rates.take_lowest() == name(0, 0)
