"""``olvae tables`` as a user types it."""

import json


def test_tables_lists_the_networks_as_json_and_in_80_columns(olvae, monkeypatch, network_rows):
    monkeypatch.setattr("olvae.bench.cases.network_table", lambda: network_rows)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = olvae("tables", "--json")
    assert (code, err) == (0, "")
    keys = {"group", "variant", "name", "params", "macs", "published_params", "published_macs"}
    assert all(row.keys() == keys for row in json.loads(out))
    shown = olvae("tables")[1]
    assert "53.3326" in shown
    assert "encoder open_litevae S" in shown
    assert max(map(len, shown.splitlines())) <= 80
