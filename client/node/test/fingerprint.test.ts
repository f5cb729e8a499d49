import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";

import { element } from "../src/der.js";
import { clientAuthentication, NO_CLIENT_AUTHENTICATION, serverIdentity } from "../src/fingerprint.js";
import { REPOSITORY } from "./support.js";

const vectors = join(REPOSITORY, "protos/vectors/contexts.json");
const skip = existsSync(vectors) ? false : "the vectors are in the repository, not in the package";

test("server identities are those of the other languages, and so is a server that asks for no certificate", { skip }, () => {
  const { certificates, server_identities, client_authentications } = JSON.parse(readFileSync(vectors, "utf8")) as {
    certificates: Record<string, string>;
    server_identities: { certificates: string[]; identity: string }[];
    client_authentications: { policy: object | null; client_authentication: string }[];
  };
  assert(server_identities.length > 0);
  for (const { certificates: names, identity } of server_identities) {
    const ders = names.map((name) => Buffer.from(certificates[name] ?? "", "hex"));
    assert.equal(serverIdentity(ders).toString("hex"), identity, names.join());
    assert.equal(serverIdentity([...ders, ...ders].reverse()).toString("hex"), identity, names.join());
  }
  const open = client_authentications.find(({ policy }) => policy === null);
  assert.equal(NO_CLIENT_AUTHENTICATION.toString("hex"), open?.client_authentication);
});

test("any bytes that are no certificate have an identity of their own, and harm nothing", () => {
  const nested = element(0x30, element(0x30, Buffer.concat(Array.from({ length: 6 }, () => element(0x30, Buffer.alloc(0))))));
  const all = ["", "30", "3080", "3003020101", "30053003020101", nested.toString("hex")];
  const identities = all.map((hex) => serverIdentity([Buffer.from(hex, "hex")]).toString("hex"));
  assert.equal(new Set(identities).size, all.length);
});

test("common names are read as UTF-8, whatever string they are", () => {
  const certificate = (tag: number, name: string): Buffer => {
    const type = element(0x06, Buffer.from("550403", "hex"));
    const attribute = element(0x30, Buffer.concat([type, element(tag, Buffer.from(name, "hex"))]));
    const subject = element(0x30, element(0x31, attribute));
    const before = [element(0xa0, Buffer.alloc(0)), ...Array.from({ length: 4 }, () => element(0x30, Buffer.alloc(0)))];
    return element(0x30, element(0x30, Buffer.concat([...before, subject])));
  };
  const utf8 = serverIdentity([certificate(0x0c, "c3a42e61")]);
  for (const [tag, name] of [
    [0x0c, "c3a42e41"],
    [0x14, "e42e61"],
    [0x1e, "00e4002e0061"],
    [0x1c, "000000e40000002e00000061"],
  ] as const) {
    assert.deepEqual(serverIdentity([certificate(tag, name)]), utf8, tag.toString(16));
  }
  for (const [tag, name] of [
    [0x1e, "00e4002e00"],
    [0x1c, "7fffffff"],
  ] as const) {
    assert.notDeepEqual(serverIdentity([certificate(tag, name)]), utf8);
  }
});

test("of authorities and revocation lists the set counts, not how they are given", () => {
  const block = (label: string, byte: number): string =>
    `-----BEGIN ${label}-----\n${Buffer.alloc(60, byte).toString("base64")}\n-----END ${label}-----\n`;
  const [one, other, list] = [block("CERTIFICATE", 1), block("CERTIFICATE", 2), block("X509 CRL", 3)];
  const print = (ca: (string | Buffer)[], crl: string[] = [], rejectUnauthorized = true): string =>
    clientAuthentication({ rejectUnauthorized, ca, crl, pfx: [] }).toString("hex");
  const both = print([one, other]);
  assert.equal(print([other + one]), both);
  assert.equal(print([Buffer.from(other), one.replace(/\n/g, "\r\n"), one]), both);
  assert.equal(print([Buffer.alloc(60, 1), Buffer.alloc(60, 2)]), both);
  const others = [print([one]), print([]), print([one, other], [list]), print([one, other], [], false)];
  assert.equal(new Set([both, ...others]).size, 5);
});
