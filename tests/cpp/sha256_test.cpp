// SHA-256 against the examples of FIPS 180-4 and of all lengths around its block size.
#include "../../csrc/kv/sha256.h"

#include "check.h"

namespace layerskip {
namespace {

std::string Hex(const Digest& digest) {
  std::string hex;
  for (const uint8_t byte : digest) {
    char digits[3];
    std::snprintf(digits, sizeof(digits), "%02x", byte);
    hex += digits;
  }
  return hex;
}

// In pieces of `step` bytes.
std::string HashOf(const std::string& text, size_t step) {
  Sha256 sha;
  for (size_t i = 0; i < text.size(); i += step) sha.Update(text.data() + i, std::min(step, text.size() - i));
  return Hex(sha.Finish());
}

void TestExamples() {
  const std::pair<std::string, const char*> examples[] = {
      {"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"},
      {"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"},
      {"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
       "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1"},
      {std::string(1000000, 'a'), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"},
  };
  for (const auto& [text, expected] : examples) {
    for (const size_t step : {1, 3, 63, 64, 65, 1000}) {
      ExpectEqual(Concat(text.size(), " bytes by ", step), HashOf(text, step), expected);
    }
  }
}

// The digest of the digests of 0, 1, ... 299 bytes, as Python's hashlib gives it: hashlib.sha256(b"".join(
// hashlib.sha256(bytes(i % 256 for i in range(n))).digest() for n in range(300))).hexdigest()
void TestLengths() {
  Sha256 all;
  std::string text;
  for (int n = 0; n < 300; ++n) {
    Sha256 sha;
    sha.Update(text.data(), text.size());
    const Digest digest = sha.Finish();
    all.Update(digest.data(), digest.size());
    text.push_back(static_cast<char>(n % 256));
  }
  ExpectEqual("0 to 299 bytes", Hex(all.Finish()), "df90175783c44235cf6aefd935a2c2747f42399416d16789ece339f1fd26d835");
}

}  // namespace
}  // namespace layerskip

int main() {
  layerskip::TestExamples();
  layerskip::TestLengths();
  return layerskip::num_failures;
}
