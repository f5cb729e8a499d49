import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

import { unwrap, wrap } from "../src/envelope.js";
import { Keyring } from "../src/keyring.js";
import { FORMAT, FleetKey, storeKey } from "../src/sealing.js";
import { AesSiv } from "../src/siv.js";
import { REPOSITORY } from "./support.js";

const vectors = join(REPOSITORY, "protos/vectors");
const skip = existsSync(vectors) ? false : "the vectors are in the repository, not in the package";
const hex = (text: string): Buffer => Buffer.from(text, "hex");
const read = (name: string): unknown => JSON.parse(readFileSync(join(vectors, name), "utf8"));

test("store keys and sealed values are those of the other languages, and what must not open does not", { skip }, () => {
  const { keyring, opens, does_not_open } = read("sealing.json") as {
    keyring: string[];
    opens: Record<"format" | "namespace" | "session_id" | "store_key" | "key" | "nonce" | "plaintext" | "sealed", string>[] &
      { not_after: number }[];
    does_not_open: (Record<"case" | "store_key" | "sealed" | "reason", string> & { now: number })[];
  };
  const ring = Keyring.fromKeys(...keyring.map(hex));
  assert(opens.some(({ format }) => format === FORMAT));
  for (const vector of opens) {
    const key = storeKey(vector.format, vector.namespace, hex(vector.session_id));
    assert.equal(key.toString("hex"), vector.store_key);
    const [plaintext, notAfter] = [hex(vector.plaintext), vector.not_after];
    assert.equal(
      new FleetKey(hex(vector.key)).seal(key, plaintext, notAfter, hex(vector.nonce)).toString("hex"),
      vector.sealed,
    );
    assert.deepEqual(ring.open(key, hex(vector.sealed), notAfter - 1), { plaintext, notAfter, foreign: true });
  }
  for (const vector of does_not_open) {
    assert.equal(ring.open(hex(vector.store_key), hex(vector.sealed), vector.now), vector.reason, vector.case);
  }
});

test("envelopes are those of the other languages, and one that is too short holds nothing", { skip }, () => {
  const { envelopes } = read("sealing.json") as {
    envelopes: (Record<"fingerprint" | "session" | "envelope", string> & { issued_microseconds: number })[];
  };
  assert(envelopes.length > 0);
  for (const vector of envelopes) {
    const [fingerprint, session] = [hex(vector.fingerprint), hex(vector.session)];
    const envelope = { fingerprint, issued: vector.issued_microseconds / 1e6, session };
    assert.equal(wrap(envelope).toString("hex"), vector.envelope);
    assert.deepEqual(unwrap(hex(vector.envelope)), envelope);
  }
  assert.equal(unwrap(Buffer.alloc(39)), undefined);
});

test("sealed ids are those of the other languages, and what must not open does not", { skip }, () => {
  const { keyring, opens, does_not_open } = read("ids.json") as {
    keyring: string[];
    opens: (Record<"namespace" | "key" | "nonce" | "id", string> & { issued: number })[];
    does_not_open: Record<"case" | "namespace" | "id", string>[];
  };
  const ring = Keyring.fromKeys(...keyring.map(hex));
  for (const { namespace, issued, key, nonce, id } of opens) {
    assert.equal(new FleetKey(hex(key)).issueId(namespace, issued, hex(nonce)).toString("hex"), id);
    assert.equal(ring.openId(namespace, hex(id)), issued);
  }
  for (const vector of does_not_open) assert.equal(ring.openId(vector.namespace, hex(vector.id)), undefined, vector.case);
});

test("AES-SIV is RFC 5297's (appendix A.1)", () => {
  const siv = new AesSiv(hex("fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"));
  const associated = hex("101112131415161718191a1b1c1d1e1f2021222324252627");
  const plaintext = hex("112233445566778899aabbccddee");
  const sealed = siv.encrypt(plaintext, associated);
  assert.equal(sealed.toString("hex"), "85632d07c6e8f37f950acd320a2ecc9340c02b9690c4dc04daef7f6afe5c");
  assert.deepEqual(siv.decrypt(sealed, associated), plaintext);
  for (const length of [0, 15, 16, 17, 40]) {
    const bytes = Buffer.alloc(length, 7);
    assert.deepEqual(siv.decrypt(siv.encrypt(bytes, associated), associated), bytes);
  }
});
