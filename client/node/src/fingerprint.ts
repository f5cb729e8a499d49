/**
 * The context fingerprint (protos/README.md, protos/vectors): server identity (16) | client authentication (16). It is that of all
 * stacks with OpenSSL for servers that ask for no client certificate. Of those that ask for one the second half is Node's own.
 */
import { createHash } from "node:crypto";

import { elementsOf, OBJECT_IDENTIFIER, OCTET_STRING, SEQUENCE, type Element } from "./der.js";

const HALF_BYTES = 16;
const SUBJECT_ALT_NAME = Buffer.from("551d11", "hex");
const COMMON_NAME = Buffer.from("550403", "hex");
const VERSION = 0xa0;
const EXTENSIONS = 0xa3;
const DNS_NAME = 0x82;
const IP_ADDRESS = 0x87;

/** The demands of a server that requests client certificates. */
export interface ClientPolicy {
  rejectUnauthorized: boolean;
  /** PEM (each may hold several certificates or lists), or DER. */
  ca: readonly (string | Uint8Array)[];
  crl: readonly (string | Uint8Array)[];
  /** PKCS#12 files: authorities in them are trusted, too. */
  pfx: readonly (string | Uint8Array)[];
}

/** Returns the identity of a server that can show these certificates (DER). */
export function serverIdentity(certificates: readonly Buffer[]): Buffer {
  return half("resumed/v1 identity", sortedSet(certificates.flatMap(namesOf)));
}

/** The client authentication of servers that request no certificate. */
export const NO_CLIENT_AUTHENTICATION = half("resumed/v1 client authentication", []);

/** Returns the client authentication of servers that request certificates. */
export function clientAuthentication(policy: ClientPolicy): Buffer {
  return half("resumed/v1 node client authentication", [
    Buffer.from([policy.rejectUnauthorized ? 1 : 0]),
    ...sortedSet([
      ...policy.ca.flatMap((each) => digestsOf("A", each)),
      ...policy.crl.flatMap((each) => digestsOf("R", each)),
      ...policy.pfx.flatMap((each) => digestsOf("P", each)),
    ]),
  ]);
}

function half(label: string, parts: Buffer[]): Buffer {
  return sha256(Buffer.concat([Buffer.from(`${label}\0`), ...parts])).subarray(0, HALF_BYTES);
}

function sha256(bytes: Uint8Array): Buffer {
  return createHash("sha256").update(bytes).digest();
}

function sortedSet(values: Buffer[]): Buffer[] {
  const sorted = values.sort((one, other) => Buffer.compare(one, other));
  return sorted.filter((value, index) => index === 0 || !sorted[index - 1]?.equals(value));
}

function digestsOf(kind: string, given: string | Uint8Array): Buffer[] {
  const bytes = Buffer.from(given as string);
  const blocks = [...bytes.toString("latin1").matchAll(/-----BEGIN [^\r\n]+-----([^-]+)-----END /g)];
  const ders = blocks.length > 0 ? blocks.map(([, base64]) => Buffer.from(base64 ?? "", "base64")) : [bytes];
  return ders.map((der) => Buffer.concat([Buffer.from(kind), sha256(der)]));
}

/** Returns kind (1) | length (2) | value of each name of a certificate. */
function namesOf(certificate: Buffer): Buffer[] {
  const [whole] = elementsOf(certificate) ?? [];
  const [signed] = elementsOf(whole?.content ?? certificate) ?? [];
  const fields = elementsOf(signed?.content ?? certificate) ?? [];
  const names = alternativeNames(fields.find(({ tag }) => tag === EXTENSIONS));
  if (names.length > 0) return names;
  // After the version: serial number, signature algorithm, issuer, validity, subject.
  const commonNames = commonNamesOf(fields[fields[0]?.tag === VERSION ? 5 : 4]);
  return commonNames.length > 0 ? commonNames : [name("X", sha256(certificate))];
}

function alternativeNames(extensions: Element | undefined): Buffer[] {
  const [list] = within(extensions);
  for (const extension of within(list)) {
    const parts = within(extension);
    const value = parts.at(-1);
    if (!parts[0]?.content.equals(SUBJECT_ALT_NAME) || value?.tag !== OCTET_STRING) continue;
    return within(within(value)[0]).flatMap(({ tag, content }) => {
      if (tag === DNS_NAME) return [name("D", lower(content))];
      return tag === IP_ADDRESS && [4, 16].includes(content.length) ? [name("I", content)] : [];
    });
  }
  return [];
}

function commonNamesOf(subject: Element | undefined): Buffer[] {
  return within(subject)
    .flatMap(within) // sets of
    .filter(({ tag }) => tag === SEQUENCE)
    .flatMap((attribute) => {
      const [type, value] = within(attribute);
      const is = type?.tag === OBJECT_IDENTIFIER && type.content.equals(COMMON_NAME);
      const text = is && value && utf8(value);
      return text ? [name("C", lower(text))] : [];
    });
}

function within(each: Element | undefined): Element[] {
  return (each && elementsOf(each.content)) ?? [];
}

function name(kind: string, value: Buffer): Buffer {
  const head = Buffer.from(`${kind}\0\0`);
  head.writeUInt16BE(value.length, 1);
  return Buffer.concat([head, value]);
}

/** A-Z as a-z. */
function lower(bytes: Buffer): Buffer {
  return Buffer.from(bytes.map((byte) => (byte >= 0x41 && byte <= 0x5a ? byte + 0x20 : byte)));
}

/** Returns the UTF-8 of a string of ASN.1, or undefined if it is malformed. */
function utf8({ tag, content }: Element): Buffer | undefined {
  switch (tag) {
    case 0x14: // TeletexString: OpenSSL takes it for Latin-1
      return Buffer.from(content.toString("latin1"));
    case 0x1e: // BMPString: UTF-16, big endian
      return content.length % 2 ? undefined : Buffer.from(Buffer.from(content).swap16().toString("utf16le"));
    case 0x1c: {
      // UniversalString: UTF-32, big endian
      const points = Array.from({ length: content.length / 4 }, (_, at) => content.readUInt32BE(at * 4));
      const sound = content.length % 4 === 0 && points.every((point) => point <= 0x10ffff);
      return sound ? Buffer.from(String.fromCodePoint(...points)) : undefined;
    }
    default:
      return content;
  }
}
