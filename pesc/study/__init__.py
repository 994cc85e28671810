"""A study: one recipe run to its report, with what each arm and seed cost beside what it gave.

    pesc study study/smollm2-6-layers --out study

Map: commands (`pesc study`), costs (times, speed, memory and devices, from the manifests), page (study.md).

The report is an object of the store, whose bytes depend on its inputs alone; so times and devices are not in it. study.md is written from the
report and the manifests together, outside of the store.
"""
