// The package as ESM code gets it: the same one.
import assert from "node:assert";
import { createRequire } from "node:module";
import { attach, Keyring, LOOKUP_BUCKETS, metrics, ResumedError } from "@resumed/node";
assert.deepEqual(
    { attach, Keyring, LOOKUP_BUCKETS, metrics, ResumedError },
    { ...createRequire(import.meta.url)("@resumed/node") },
);
