import assert from "node:assert/strict";
import { execFileSync } from "node:child_process";
import { X509Certificate } from "node:crypto";
import { test } from "node:test";
import tls from "node:tls";

import { element } from "../src/der.js";
import { Session } from "../src/session.js";
import { bare, listen, pem, VERSIONS, visit } from "./support.js";

/** What OpenSSL's own command reads in a session. */
function read(serialized: Buffer): string {
  const lines = (serialized.toString("base64").match(/.{1,64}/g) ?? []).join("\n");
  const input = `-----BEGIN SSL SESSION PARAMETERS-----\n${lines}\n-----END SSL SESSION PARAMETERS-----\n`;
  return execFileSync("openssl", ["sess_id", "-text", "-noout"], { input, encoding: "utf8" });
}

for (const version of VERSIONS) {
  test(`what is changed in a session of ${version}, OpenSSL reads, and nothing else changes`, async (context) => {
    const server = tls.createServer({ cert: pem, key: pem }, (socket) => socket.on("error", () => undefined).write("x"));
    const serialized = bare((await visit(await listen(context, server), version)).session);
    const session = Session.parse(serialized);
    assert(session);
    assert.deepEqual(session.serialize(), serialized);
    const unchanged = read(serialized);
    session.time = 0x8765_4321; // beyond 2038, with its highest bit set
    session.timeout = 604_800;
    session.hostName = "bank.example";
    assert.deepEqual([session.lineage, session.peer, session.verified], [undefined, new X509Certificate(pem).raw, true]);
    const lineage = { fingerprint: Buffer.alloc(32, 9), issued: 1_764_000_000.123456, end: 1_764_007_200 };
    session.lineage = lineage;
    session.idContext = Buffer.alloc(32, 0xab);
    assert.deepEqual([session.timeout, session.hostName], [604_800, "bank.example"]);
    const changed = read(session.serialize());
    assert.match(changed, new RegExp(`Start Time: 2271560481\\n`));
    assert.match(changed, /Timeout {3}: 604800 /);
    assert.match(changed, /Session-ID-ctx: (AB){32}\n/);
    const other = /Start Time|Timeout|Session-ID-ctx/;
    const rest = (text: string): string[] => text.split("\n").filter((line) => !other.test(line));
    assert.deepEqual(rest(changed), rest(unchanged));
    session.hostName = "";
    assert.equal(session.hostName, "");
    const again = Session.parse(session.serialize());
    assert.deepEqual(again?.id, session.id);
    assert.deepEqual([again.lineage, again.idContext], [lineage, Buffer.alloc(32, 0xab)]);
    session.lineage = undefined;
    assert.equal(session.lineage, undefined);
  });
}

test("ticket application data without the mark are somebody else's", () => {
  // The fixed fields, then the data: "resumed" 02 | fingerprint (32) | issue time (8) | end (8) | an id (32).
  const withData = (data: Buffer): Session => {
    const field = element(0xb2, element(0x04, data));
    const fixed = Buffer.from("020101020203040402c02f04000400", "hex");
    const session = Session.parse(element(0x30, Buffer.concat([fixed, field])));
    assert(session);
    return session;
  };
  const ours = Buffer.from(`726573756d656402${"09".repeat(32)}0006445941624000000000006922ed20${"07".repeat(32)}`, "hex");
  const isForeign = (data: Buffer): boolean => {
    const { lineage, hasForeignData } = withData(data);
    assert.equal(lineage === undefined, hasForeignData);
    return hasForeignData;
  };
  const { lineage } = withData(ours);
  assert.deepEqual(lineage, { fingerprint: Buffer.alloc(32, 9), issued: 1_764_000_000, end: 0x6922_ed20 });
  for (const data of ["theirs", "resumed\x01", "resumed\x02"]) {
    assert(isForeign(Buffer.from(data.padEnd(20), "latin1")), data);
  }
  assert(isForeign(Buffer.concat([Buffer.from("resumed\x01"), ours.subarray(8)])));
  assert(!isForeign(ours));
});

test("a session shows the certificate of its client, and whether it was verified", () => {
  const fixed = "020101020203040402c02f04000400";
  const read = (fields: string): Session | undefined => Session.parse(element(0x30, Buffer.from(fixed + fields, "hex")));
  assert.equal(read("a3053003020107")?.peer?.toString("hex"), "3003020107");
  assert.equal(read("a503020100")?.verified, true);
  assert.equal(read("a503020112")?.verified, false);
  assert.equal(read("a50402020100")?.verified, false);
});

test("any bytes that are no session are none", () => {
  for (const hex of [
    "",
    "30",
    "3003020101",
    "3080",
    "308401000000",
    "30820100",
    "0400",
    "300e020101020203040402c02f04000401",
  ]) {
    assert.equal(Session.parse(Buffer.from(hex, "hex")), undefined, hex);
  }
  assert(Session.parse(Buffer.from("300f020101020203040402c02f04000400", "hex")));
});
