/** Predicts the choices of a server in TLS 1.3, as far as Node shows them before the handshake. */
import type { Hello } from "./hello.js";

/** OpenSSL's names of groups, in lower case, and their numbers in a ClientHello. */
const GROUPS: Readonly<Record<string, number>> = {
  ...{ "p-256": 23, prime256v1: 23, secp256r1: 23, "p-384": 24, secp384r1: 24, "p-521": 25, secp521r1: 25 },
  ...{ x25519: 29, x448: 30, ffdhe2048: 256, ffdhe3072: 257, ffdhe4096: 258, ffdhe6144: 259, ffdhe8192: 260 },
  ...{ secp256r1mlkem768: 0x11eb, x25519mlkem768: 0x11ec, secp384r1mlkem1024: 0x11ed },
};

const CIPHERS: Readonly<Record<string, number>> = {
  ...{ TLS_AES_128_GCM_SHA256: 0x1301, TLS_AES_256_GCM_SHA384: 0x1302, TLS_CHACHA20_POLY1305_SHA256: 0x1303 },
  ...{ TLS_AES_128_CCM_SHA256: 0x1304, TLS_AES_128_CCM_8_SHA256: 0x1305 },
};

/** Whether sessions of one cipher of TLS 1.3 resume with another: they have the same hash (RFC 8446 section 4.2.11). */
export function haveOneHash(one: number, other: number): boolean {
  return (one === CIPHERS.TLS_AES_256_GCM_SHA384) === (other === CIPHERS.TLS_AES_256_GCM_SHA384);
}

/** Returns the number of a cipher of TLS 1.3, or undefined of another one. */
export function cipherOf(name: string | undefined): number | undefined {
  return name === undefined ? undefined : CIPHERS[name];
}

/** Returns the cipher that a server with these `ciphers` chooses of a client's, or undefined if it has none of them. */
export function chosenCipher({ ciphers }: Hello, own: string, ownOrder: boolean): number | undefined {
  const known = own.split(":").flatMap((name) => cipherOf(name) ?? []);
  return ownOrder ? known.find((each) => ciphers.includes(each)) : ciphers.find((each) => known.includes(each));
}

/**
 * Whether the client brings a key for no group of a server's `ecdhCurve`, so that the key exchange is tried again
 * (HelloRetryRequest, RFC 8446 section 4.1.4). A list that is
 * OpenSSL's own (`auto`), or has a name that is not known here, shows nothing: false.
 */
export function isRetried({ keyShares }: Hello, ecdhCurve: string): boolean {
  const groups = ecdhCurve.split(/[:/]/).map((name) => GROUPS[name.replace(/^[?*-]+/, "").toLowerCase()]);
  return !groups.includes(undefined) && !keyShares.some((group) => groups.includes(group));
}
