/** The formats of ticket secrets are those of the other languages. */
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { inspect } from "node:util";

import { FleetKey } from "../src/sealing.js";
import { encodeEpoch, epochAt, notAfterOf, TicketSecret } from "../src/ticket-secret.js";
import { REPOSITORY } from "./support.js";

const vectors = join(REPOSITORY, "protos/vectors/tickets.json");
const skip = existsSync(vectors) ? false : "the vectors are in the repository, not in the package";
const hex = (text: string): Buffer => Buffer.from(text, "hex");

interface Vector {
  namespace: string;
  key: string;
  start: number;
  rotation: number;
  generation: number;
  secret: string;
  created_microseconds: number;
  lifetime: number;
  not_after: number;
  address: string;
  plaintext: string;
  nonce: string;
  sealed: string;
  name: string;
  raw48: string;
}

function read(): Vector[] {
  return (JSON.parse(readFileSync(vectors, "utf8")) as { secrets: Vector[] }).secrets;
}

test("addresses, values, names and keys are those of the other languages", { skip }, () => {
  for (const vector of read()) {
    const { start, rotation, generation } = vector;
    const epoch = { start, rotation, generation };
    const fleetKey = new FleetKey(hex(vector.key));
    assert.equal(notAfterOf(epoch, vector.lifetime), vector.not_after);
    const created = vector.created_microseconds / 1e6;
    const secret = new TicketSecret(vector.namespace, fleetKey, epoch, hex(vector.secret), created, vector.not_after);
    assert.equal(secret.address.toString("hex"), vector.address);
    assert.equal(secret.encode().toString("hex"), vector.plaintext);
    assert.equal(secret.name.toString("hex"), vector.name);
    assert.equal(secret.raw48.toString("hex"), vector.raw48);
    const sealed = fleetKey.seal(secret.address, secret.encode(), vector.not_after, hex(vector.nonce));
    assert.equal(sealed.toString("hex"), vector.sealed);
    const decoded = TicketSecret.decode(vector.namespace, fleetKey, epoch, hex(vector.plaintext), vector.not_after);
    assert.equal(decoded?.raw48.toString("hex"), vector.raw48);
    assert.equal(decoded.created, created);
  }
});

test("a plaintext of another version or length is no secret", { skip }, () => {
  const [vector] = read();
  assert(vector);
  const { namespace, start, rotation, generation } = vector;
  const plaintext = hex(vector.plaintext);
  const sealing: FleetKey = new FleetKey(hex(vector.key));
  for (const other of [plaintext.subarray(1), Buffer.concat([plaintext, plaintext]), Buffer.alloc(plaintext.length, 2)]) {
    assert.equal(TicketSecret.decode(namespace, sealing, { start, rotation, generation }, other, 0), undefined);
  }
});

test("epochs begin at multiples of their length", () => {
  assert.deepEqual(epochAt(7199.9, 3600), { start: 3600, rotation: 3600, generation: 0 });
  assert.equal(encodeEpoch({ start: 0x01020304, rotation: 0x050607, generation: 8 }).toString("hex"), "0102030405060708");
});

test("a secret that is printed or erased shows nothing", { skip }, () => {
  const [vector] = read();
  assert(vector);
  const { namespace, start, rotation, generation } = vector;
  const bytes = hex(vector.secret);
  const secret = new TicketSecret(namespace, new FleetKey(hex(vector.key)), { start, rotation, generation }, bytes, 0, 1);
  const raw = secret.raw48.subarray(16).toString("hex");
  for (const shown of [inspect(secret, { depth: 9, showHidden: true }), JSON.stringify(secret), String(secret)]) {
    assert(!shown.includes(vector.secret) && !shown.includes(raw));
  }
  secret.erase();
  assert.deepEqual(bytes, Buffer.alloc(32));
});
